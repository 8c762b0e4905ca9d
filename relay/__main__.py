"""`python -m relay CHANNEL_FD`: started by the supervisor when the first pair may come."""

from relay.main import main

if __name__ == "__main__":
    main()
