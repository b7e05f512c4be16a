"""Which of cuSPARSELt's algorithms multiplies by a 2:4 weight, by its number. Read off benchmarks/tune_cusparselt.py on an H100.

A number means something in one version of the library on one GPU only: any other runs the library's own choice. Of what was measured
(layers of Llama 3 8B and 14336 x 4096 at 8 to 8192 rows of x) the rule misses the best by more than 1 % only at 4096 x 14336 and 512
rows, by 6 %: the library's choice there is the best of 4096 x 4096.
"""

OWN = 0  # the library's choice
WHERE = (9, 0), 800  # compute capability, and version as torch.backends.cusparselt.version() has it: an H100, 0.8.0
FEWEST = 512  # rows of x from which a product was as fast as cuBLAS on every layer measured there


def choose(N: int, K: int, M: int, where: tuple[tuple[int, int], int | None]) -> int:
    """For M rows of x by a weight [N, K], where: on a GPU of some compute capability, by some version of the library."""
    if where != WHERE:
        return OWN
    if M > 1024:
        return 17
    if M <= 256:
        return 15 if N * K < 2**25 else 20
    return 20 if N > 4096 else OWN
