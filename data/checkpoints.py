"""What a training run keeps on disk: the best model, and a checkpoint by which a killed run is resumed."""

import math
import time
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import keras
import numpy as np
from keras import ops

from data import files
from data.files import InputError


class BestModel(keras.callbacks.ModelCheckpoint):
    """Saves `model`, which shares the weights of the network in training, whenever val_loss is the lowest so far."""

    def __init__(self, path: Path, model: keras.Model) -> None:
        super().__init__(str(path), "val_loss", mode="min", save_best_only=True, initial_value_threshold=math.inf)
        self.path, self.saved_model = path, model

    def set_model(self, model: keras.Model) -> None:
        super().set_model(self.saved_model)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        with files.whole_file(self.path, room=4 * self.saved_model.count_params() + 10**6) as temporary:
            self.filepath = str(temporary)
            super().on_epoch_end(epoch, logs)


class Checkpoint(keras.callbacks.Callback):
    """After every epoch, in one file, all that a killed run needs to go on as if it had not been killed: the weights,
    the state of the optimizer, of dropout and of the callbacks before this one, the history and the seconds spent.

    There is no lock. Two runs with the same settings in one folder compute the same, and every file is renamed into
    place; a run with other settings is refused."""

    STATE = ("wait", "best")

    def __init__(self, folder: Path, run: dict) -> None:
        super().__init__()
        self.path, self.run, self.others = folder / "checkpoint.npz", run, []
        self.history, self.states, self.seconds, self.early_stop, self.diverged = [], [], 0.0, False, False
        if self.path.exists():
            vars(self).update(files.read_checkpoint(self.path, run)[0])
        folder.mkdir(parents=True, exist_ok=True)

    def variables(self) -> list:
        return [*self.model.variables, *self.model.optimizer.variables]

    def save(self) -> None:
        self.states = [{name: vars(c)[name] for name in self.STATE if name in vars(c)} for c in self.others]
        kept = {name: vars(self)[name] for name in ("run", "history", "states", "seconds", "early_stop")}
        files.write_checkpoint(self.path, kept, [ops.convert_to_numpy(v) for v in self.variables()])

    def on_train_begin(self, logs: dict | None = None) -> None:
        if self.history:
            _, values = files.read_checkpoint(self.path, self.run, len(self.variables()))
            if [v.shape for v in self.variables()] != [value.shape for value in values]:
                raise InputError(f"{self.path}: is of another network; --fresh starts the run anew")
            for variable, value in zip(self.variables(), values, strict=True):
                variable.assign(value)
            for callback, state in zip(self.others, self.states, strict=True):
                vars(callback).update(state)
            print(f"{self.path.parent}: resuming an unfinished run after {len(self.history)} epochs", flush=True)
        self.start = time.perf_counter() - self.seconds
        self.save()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if self.history:
            left = self.seconds / len(self.history) * (self.params["epochs"] - len(self.history))
            print(f"at most {timedelta(seconds=round(left))} left", flush=True)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        row = {name: float(value) for name, value in (logs or {}).items()}
        if not all(np.isfinite(value) for value in row.values()):
            self.diverged = self.model.stop_training = True
            return
        files.read_checkpoint(self.path, self.run)  # Raises if another run has taken the folder.
        self.history.append(row)
        self.seconds, self.early_stop = time.perf_counter() - self.start, bool(self.model.stop_training)
        self.save()


def load_trained(path: Path) -> keras.Model:
    """The model in a file that this script made. Raises InputError where there is none or another kind of file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a trained model (python train_model_v5.py makes one)")
    try:
        model = keras.models.load_model(path)
        names = [x.name for x in model.inputs]
    except Exception as error:  # Keras and h5py raise many kinds for a torn or foreign file.
        raise InputError(f"{path}: cannot be loaded as a model: {files.one_line(error)}") from None
    if names != ["n", "k", "m", "P_matrix"]:
        raise InputError(f"{path}: takes {', '.join(names)}, expected a model that takes n, k, m, P_matrix")
    return model


# For one prediction after the other. A file that has changed since is not read again.
load_once = lru_cache(load_trained)
