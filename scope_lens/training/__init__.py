"""Training: one harvest of activations, any number of dictionaries, Gemma Scope's recipe."""

from scope_lens.training.config import TrainConfig as TrainConfig
from scope_lens.training.export import gemma_scope_path as gemma_scope_path
from scope_lens.training.export import save_gemma_scope as save_gemma_scope
from scope_lens.training.store import ActivationStore as ActivationStore
from scope_lens.training.trainer import StepResult as StepResult
from scope_lens.training.trainer import Trainer as Trainer
