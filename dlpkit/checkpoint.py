"""Packed models as plain Hugging Face folders: `import dlpkit` is all that from_pretrained needs.

On disk every pruned Linear X is X.weight (its nonzero values), X.weight_mask and X.weight_offsets (dlpkit.kernels.storage), whatever
runs later. A quantizer registered with transformers makes the edits that a config cannot tell (dlpkit.edits) and swaps the Linears while
the model is still on the meta device, lets transformers load the stored tensors, and packs them layer by layer. Without dlpkit the
shape of X.weight does not fit, so a plain load fails loudly instead of returning random layers.
"""

from collections import Counter
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from dlpkit import edits as structural
from dlpkit import surgery
from dlpkit.edits import Edit
from dlpkit.folders import new_folder
from dlpkit.kernels import dispatch, formats
from dlpkit.models import load_model, read_config
from dlpkit.packing import pack_linears, pack_stored, put, sparse_linears, unpack_linears
from dlpkit.sparse import SparseLinear

METHOD = "dlpkit"
FORMAT_VERSION = 1
ROUNDING = (
    0.1  # relative difference of logits that 16-bit sums in another order stay below; a wrong weight gives about 1
)
PROBE_TOKENS = 8  # length of the prompt on which a saved model is compared with the one in memory

logger = logging.get_logger(__name__)


@register_quantization_config(METHOD)
class DlpkitConfig(QuantizationConfigMixin):
    """quantization_config of a packed or edited model.

    modules: [N, K, nonzero values] of every packed Linear by name. edits: dlpkit.edits as dicts. runtime: a format or "auto",
    which picks for `batch` sequences decoded together; transformers takes neither from its own `quantization_config` argument, so set them
    in the `quantization_config` of the config that it is given, as `load` does.
    """

    def __init__(
        self,
        modules: dict[str, list[int]] | None = None,
        edits: list[dict] | None = None,
        format_version: int = FORMAT_VERSION,
        runtime: str = "auto",
        batch: int = 1,
        **kwargs,
    ):
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has dlpkit format version {format_version}, this dlpkit reads {FORMAT_VERSION}: update it"
            )
        if runtime != "auto" and runtime not in formats.names():
            raise ValueError(f"runtime is 'auto' or one of {', '.join(formats.names())}, got {runtime!r}")
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch is the number of sequences decoded together, at least 1, got {batch!r}")
        if not isinstance(edits or [], list):
            raise ValueError(f"config.json: edits are a list, got {edits!r}; the file is damaged")
        self.quant_method = METHOD
        self.format_version = format_version
        self.modules = modules or {}
        self.edits = edits or []
        self.runtime, self.batch = runtime, batch

    def to_dict(self) -> dict:
        """What config.json says. Runtime and batch are not among it: they belong to who loads."""
        told = {"quant_method": METHOD, "format_version": self.format_version, "modules": self.modules}
        return told | ({"edits": self.edits} if self.edits else {})


@register_quantizer(METHOD)
class DlpkitQuantizer(HfQuantizer):
    """transformers' hooks around loading and saving. It loads packed and edited checkpoints and never compresses on the fly."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        try:
            surgery.apply(model, [structural.from_dict(edit) for edit in self.quantization_config.edits])
        except ValueError as error:
            raise ValueError(f"config.json: {error}; the file is damaged") from error
        for name, facts in self.quantization_config.modules.items():
            linear = _linear(model, name)
            N, K, nnz = facts if isinstance(facts, list) and len(facts) == 3 else (None, None, None)
            if (linear.out_features, linear.in_features) != (N, K) or not isinstance(nnz, int) or not 0 <= nnz <= N * K:
                raise ValueError(
                    f"config.json: {name} [{linear.out_features}, {linear.in_features}] cannot be {facts}; the file is damaged"
                )
            put(model, name, SparseLinear.empty(linear, nnz))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        for name, sparse in sparse_linears(model).items():
            if sparse.weight.is_meta:
                raise ValueError(
                    f"{name} was offloaded: packed layers cannot wait on CPU or disk, choose a device_map that fits"
                )
        pack_stored(model, self.quantization_config.runtime, self.quantization_config.batch)
        wins, reason = dispatch.available(next(model.parameters()).device)
        if self.quantization_config.modules and self.quantization_config.runtime == "auto" and not wins:
            logger.warning_once(f"dlpkit: {reason}")
        counts = Counter(sparse.format for sparse in sparse_linears(model).values())
        logger.info(f"dlpkit: packed Linears by format: {dict(counts)}")

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside the packed weights

    @property
    def is_compileable(self) -> bool:
        return True


def pack(model: PreTrainedModel, format: str = "auto", batch: int = 1) -> PreTrainedModel:
    """Pack the prunable Linears of a causal LM in place, so that it runs packed and save_pretrained writes the packed layout.

    format, batch: as `runtime` and `batch` of `load`. Raises ValueError for an unknown format, or for one that the zeros do not fit ("nm" of
    an unstructured weight).
    """
    pack_linears(model, format, batch)
    return _described(model)


def unpack(model: PreTrainedModel) -> PreTrainedModel:
    """Make a packed model a dense one with the same weights, in place."""
    unpack_linears(model)
    return _described(model)


def edit(model: PreTrainedModel, edits: list[Edit]) -> PreTrainedModel:
    """Drop, merge or slice layers of a causal LM in place, so that save_pretrained writes what loads as it is.

    A model that has only lost or merged whole layers stays an ordinary one and loads without dlpkit; one whose layers are sliced to one
    size does where transformers can be told of that size. Raises ValueError, before any change, for edits that do not fit the model or one another.
    """
    surgery.apply(model, edits)
    surgery.tell(model)
    return _described(model)


def save(
    model: PreTrainedModel, folder: str | Path, tokenizer=None, verify: bool = True, overwrite: bool = False
) -> None:
    """Write a Hugging Face folder, whole or not at all: packed if the model is packed, ordinary and dense if it is not.

    verify: load what was written and compare logits before the folder gets its name. Raises ValueError when `folder` is taken (unless
    `overwrite`) and RuntimeError when the reloaded model differs.
    """
    with new_folder(folder, overwrite) as new:
        write(model, new, tokenizer)
        if verify:
            compare(
                model,
                load(new, "dense" if sparse_linears(model) else "auto", model.get_input_embeddings().weight.device),
            )


def write(model: PreTrainedModel, folder: Path, tokenizer=None) -> None:
    """The files of a model, and of its tokenizer, into an existing folder."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def compare(model: PreTrainedModel, again: PreTrainedModel) -> None:
    """Raise RuntimeError unless both give the same logits on a fixed prompt: exactly, or to rounding where a sparse kernel runs."""
    device = model.get_input_embeddings().weight.device
    prompt = torch.arange(PROBE_TOKENS, device=device)[None] * 7 % model.config.vocab_size
    logits, other = (m(input_ids=prompt, use_cache=False).logits.float() for m in (model, again))
    runs_dense = all(sparse.format == "dense" for m in (model, again) for sparse in sparse_linears(m).values())
    error = ((other - logits).norm() / logits.norm()).item()
    if not error <= (0.0 if runs_dense else ROUNDING):
        raise RuntimeError(
            f"the saved model does not compute what the one in memory does (relative difference of logits {error:.2e})"
        )


def load(
    name: str | Path, runtime: str = "auto", device: torch.device | str = "cpu", dtype: str | torch.dtype = "auto",
    batch: int = 1,
) -> PreTrainedModel:  # fmt: skip
    """A packed or an ordinary causal LM, from a folder, hub id or alias.

    runtime: the format of packed weights; "auto" for the one measured to be fastest on the device when `batch` sequences are decoded
    together, which is dense for a weight where none beats it. Other batches work too, and may be slower than dense.
    """
    config = read_config(name)
    packed = getattr(config, "quantization_config", None)
    if packed is not None and packed.get("quant_method") == METHOD:
        config.quantization_config = {**packed, "runtime": runtime, "batch": batch}
    elif runtime != "auto":
        raise ValueError(
            f"{name} is not packed, so it has no runtime format to choose: pack it first with `dlpkit pack`"
        )
    return load_model(name, config, dtype, device)


def _described(model: PreTrainedModel) -> PreTrainedModel:
    """Have the model's config say what it holds that an ordinary one does not, or nothing."""
    modules = {name: [*sparse.shape, sparse.nnz()] for name, sparse in sparse_linears(model).items()}
    edits = [structural.to_dict(edit) for edit in surgery.residue(model)]
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    if modules or edits:
        config = DlpkitConfig(modules, edits)
        model.config.quantization_config, model.hf_quantizer = config, DlpkitQuantizer(config)
        model.is_quantized, model.quantization_method = True, METHOD
    return model


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"config.json names a packed Linear {name!r} that this model does not have; the file is damaged"
        )
    return linear
