"""Ordinary LightningModules for classification, with optional adversarial training. They do not know the monitor."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.functional import pgd
from recipes.common.networks import digits_cnn, digits_mlp, overfitting_cnn


class Classifier(LightningModule):
    """Cross-entropy training of any network, on clean or on attacked inputs.

    Args:
        network: Maps images in [0, 1] to logits.
        learning_rate: Learning rate of Adam.
        attack_epsilon: L∞ radius of the PGD attack on training inputs, as in arXiv 1706.06083; 0 trains on clean
            inputs.
        attack_steps: Gradient steps of that attack.
    """

    def __init__(
        self, network: nn.Module, learning_rate: float = 2e-3, attack_epsilon: float = 0.0, attack_steps: int = 7
    ) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate
        self.attack_epsilon = attack_epsilon
        self.attack_steps = attack_steps

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, C)."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        x, y = batch
        if self.attack_epsilon > 0:
            # one generator per step, so that a resumed run repeats the same attacks
            generator = torch.Generator(self.device).manual_seed(self.global_step)
            x = pgd(
                self,
                x,
                y,
                epsilon=self.attack_epsilon,
                steps=self.attack_steps,
                valid_range=(0.0, 1.0),
                generator=generator,
            )
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log accuracy and loss on the clean inputs of the first validation set."""
        if dataloader_idx > 0:
            return
        x, y = batch
        logits = self(x)
        values = {"val_acc": (logits.argmax(dim=1) == y).float().mean(), "val_loss": F.cross_entropy(logits, y)}
        self.log_dict(values, batch_size=len(y), add_dataloader_idx=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class DigitsClassifier(Classifier):
    """A small CNN or MLP for the digits of scikit-learn.

    Args:
        network: ``"cnn"`` or ``"mlp"``.
        width: Channels of the first convolution, or units of a hidden layer.
        dropout: Dropout probability.
        learning_rate: Learning rate of Adam.
        attack_epsilon: See :class:`Classifier`.
        attack_steps: See :class:`Classifier`.
    """

    def __init__(
        self,
        network: Literal["cnn", "mlp"] = "cnn",
        width: int = 16,
        dropout: float = 0.1,
        learning_rate: float = 2e-3,
        attack_epsilon: float = 0.0,
        attack_steps: int = 7,
    ) -> None:
        build = {"cnn": digits_cnn, "mlp": digits_mlp}[network]
        super().__init__(build(width, dropout), learning_rate, attack_epsilon, attack_steps)
        self.save_hyperparameters()


class OverfittingClassifier(Classifier):
    """Adversarial training that overfits: SGD without regularisation.

    Args:
        learning_rate: Learning rate of SGD with momentum 0.9.
        attack_epsilon: See :class:`Classifier`.
        attack_steps: See :class:`Classifier`.
        image_size: Height and width; 8 for grey digits, any other size for images of three channels.
        decay: Whether the learning rate is divided by ten halfway through training.
        seed: Seed of the initial weights.
    """

    def __init__(
        self,
        learning_rate: float = 0.05,
        attack_epsilon: float = 0.1,
        attack_steps: int = 7,
        image_size: int = 8,
        decay: bool = True,
        seed: int = 0,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = overfitting_cnn() if image_size == 8 else overfitting_cnn(3, image_size, (32, 64, 128), 3)
        super().__init__(network, learning_rate, attack_epsilon, attack_steps)
        self.decay = decay
        self.save_hyperparameters()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD, with a learning rate that drops halfway or stays."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)
        if not self.decay:
            return optimizer
        half = max(1, (self.trainer.max_epochs or 2) // 2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, half)}
