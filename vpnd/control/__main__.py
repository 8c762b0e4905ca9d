"""`python -m vpnd.control CHANNEL_FD`: the control process, started by the supervisor."""

import gc

if __name__ == "__main__":
    gc.disable()  # nothing of what is imported goes again: looking for it is a tenth of the start
    from vpnd import lean

    with lean.without():
        from vpnd.control.main import main

    main()
