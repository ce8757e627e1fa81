"""The harness's command line, knowing `--model memlm`."""

from memlm.eval.harness import main

if __name__ == "__main__":
    main()
