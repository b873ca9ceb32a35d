"""Draw a translation's attention; ``--help`` explains."""

from fairseq_rkm.experiments.attention_map import main

if __name__ == "__main__":
    main()
