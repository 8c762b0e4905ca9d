"""`python -m vpnd.relay CHANNEL_FD`: started by the supervisor when the first pair may come."""

from vpnd.relay.main import main

if __name__ == "__main__":
    main()
