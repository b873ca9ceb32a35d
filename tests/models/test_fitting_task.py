import pytest
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.masked_lm import MaskedLMTask
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from fairseq.tasks.translation import TranslationTask

from fairseq_rkm import RKMError
from fairseq_rkm.models import RKMClassifier, RKMLanguageModel, RKMModel, RKMSignalClassifier
from fairseq_rkm.models.fitting_task import check_task
from fairseq_rkm.tasks.signal_classification import SignalClassificationTask
from fairseq_rkm.tasks.stateful_language_modeling import StatefulLanguageModelingTask

TASKS = {
    LanguageModelingTask: ("language_modeling", "rkm_lm"),
    StatefulLanguageModelingTask: ("stateful_language_modeling", "rkm_lm"),
    TranslationTask: ("translation", "rkm"),
    SentencePredictionTask: ("sentence_prediction", "rkm_classifier"),
    SignalClassificationTask: ("signal_classification", "rkm_signal_classifier"),
}


@pytest.mark.parametrize("arch", ["rkm", "rkm_lm", "rkm_classifier", "rkm_signal_classifier"])
@pytest.mark.parametrize("kind", TASKS)
def test_a_task_goes_with_its_architecture_alone(arch, kind):
    name, fitting = TASKS[kind]
    task = kind.__new__(kind)
    if arch == fitting:
        check_task(arch, task)
    else:
        with pytest.raises(
            RKMError, match=f"^--task {name} goes with --arch {fitting} or a preset of it, not with {arch}$"
        ):
            check_task(arch, task)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (RKMModel, LanguageModelingTask),
        (RKMLanguageModel, TranslationTask),
        (RKMClassifier, LanguageModelingTask),
        (RKMSignalClassifier, SentencePredictionTask),
        (RKMClassifier, SignalClassificationTask),
    ],
)
def test_each_model_is_built_for_a_fitting_task_alone(model, kind):
    with pytest.raises(RKMError, match=r"^--task \w+ goes with --arch"):
        model.build_model(None, kind.__new__(kind))


def test_a_task_that_is_not_in_the_registry_goes_by_its_class():
    class Mine(TranslationTask):
        pass

    check_task("rkm", Mine.__new__(Mine))
    with pytest.raises(RKMError, match=r"--task Mine goes with --arch rkm "):
        check_task("rkm_lm", Mine.__new__(Mine))


def test_another_kind_of_task_may_go_with_any():
    for arch in ("rkm", "rkm_lm", "rkm_classifier"):
        check_task(arch, MaskedLMTask.__new__(MaskedLMTask))
