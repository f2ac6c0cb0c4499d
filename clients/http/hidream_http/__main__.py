from hidream_http.command import main

if __name__ == "__main__":
    main()
