"""Prepare parallel text: ``--help`` explains."""

from fairseq_rkm.experiments.translation_data import main

if __name__ == "__main__":
    main()
