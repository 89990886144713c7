from aki.cli import main

main()
