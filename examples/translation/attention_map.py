"""Draw where a model looked: ``--help`` says how."""

from fairseq_rkm.experiments.attention_map import main

if __name__ == "__main__":
    main()
