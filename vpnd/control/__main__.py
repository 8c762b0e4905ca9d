"""`python -m vpnd.control CHANNEL_FD`: the control process, started by the supervisor."""

import sys

from vpnd.control.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
