"""Write a small corpus; ``--help`` explains."""

from fairseq_rkm.experiments.python_reference_corpus import main

if __name__ == "__main__":
    main()
