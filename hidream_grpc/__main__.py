from hidream_grpc.cli import main

main()
