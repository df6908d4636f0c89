"""Trainers of Transformers."""

from typing import Any

from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.support import trainings


class NetOutputs(nn.Module):
    """The network of the trainings by hand, as a Trainer calls it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = trainings.net_of(seed)

    def forward(self, inputs: Tensor, targets: Tensor, scales: Tensor) -> dict[str, Tensor]:
        return {"loss": trainings.loss_of(self.net, (inputs, targets, scales))}


class InOrder(Trainer):  # type: ignore[misc]
    """Trains on the data in their order."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def rows() -> list[dict[str, Tensor]]:
    names = ("inputs", "targets", "scales")
    return [dict(zip(names, row, strict=True)) for row in trainings.loader().dataset]


def hf_trainer(folder: Any, *callbacks: TrainerCallback, **arguments: Any) -> Any:
    model = arguments.pop("model", None) or NetOutputs()
    kind = arguments.pop("kind", InOrder)
    optimizer = arguments.pop("optimizer", trainings.momentum)(model)
    given: dict[str, Any] = {
        "max_grad_norm": 0,
        "max_steps": trainings.BATCHES,
        "per_device_train_batch_size": trainings.SIZE,
        "logging_steps": 2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": ["targets"],
        "prediction_loss_only": True,
    }
    return kind(
        model,
        TrainingArguments(str(folder), **{**given, **arguments}),
        train_dataset=rows(),
        eval_dataset=rows()[:4],
        optimizers=(optimizer, None),
        callbacks=[*callbacks],
    )


def trained_trainer(
    folder: Any, *callbacks: TrainerCallback, resume: Any = None, **arguments: Any
) -> Any:
    """Train with a trainer, which is returned, and leaves its optimizer free."""
    trainer = hf_trainer(folder, *callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    trainings.assert_free(trainer.optimizer)
    return trainer


def log_entries(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]
