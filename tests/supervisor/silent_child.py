"""A child that holds its channel and says and hears nothing: `python -m tests.supervisor.silent_child FD`."""

import time

if __name__ == "__main__":
    time.sleep(600)
