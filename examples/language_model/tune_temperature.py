"""Choose a softmax's temperature: ``--help`` explains."""

from fairseq_rkm.experiments.temperature_tuning import main

if __name__ == "__main__":
    main()
