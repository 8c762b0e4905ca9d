"""`python -m vpnd.control CHANNEL_FD`: the control process, started by the supervisor."""

from vpnd.control.main import main

if __name__ == "__main__":
    main()
