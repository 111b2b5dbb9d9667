import signal

# Until the process has handlers of its own, Ctrl-C ends it as SIGTERM does: at once, and without a traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from gateway.main import main  # noqa: E402 - its imports take seconds

main()
