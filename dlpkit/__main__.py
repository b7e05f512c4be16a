from dlpkit.cli import main

main()
