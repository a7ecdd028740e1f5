r"""Train a classifier from a configuration file, with the robustness monitor on.

    python -m recipes.train fit --config configs/digits.yaml
    python -m recipes.train fit --config configs/digits.yaml --config configs/digits_adversarial.yaml
    python -m recipes.train validate --config runs/digits/version_0/config.yaml \
        --ckpt_path runs/digits/version_0/checkpoints/last.ckpt

Any LightningModule and data module will do: name them by `class_path`, as the configuration files do.
"""

from __future__ import annotations

from lightning.pytorch.cli import ArgsType, LightningCLI


def main(args: ArgsType = None) -> LightningCLI:
    """Run Lightning's command line."""
    return LightningCLI(args=args, seed_everything_default=0)


if __name__ == "__main__":
    main()
