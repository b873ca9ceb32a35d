"""Choose a continuous cache's numbers: ``--help`` explains."""

from fairseq_rkm.experiments.cache_tuning import main

if __name__ == "__main__":
    main()
