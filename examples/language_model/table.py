"""Train a table of language models: ``--help`` explains."""

from fairseq_rkm.experiments.language_model_table import main

if __name__ == "__main__":
    main()
