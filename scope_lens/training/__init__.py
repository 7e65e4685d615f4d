"""Training: one harvest of activations, any number of dictionaries, Gemma Scope's recipe."""

from scope_lens.training.checkpoint import checkpoints as checkpoints
from scope_lens.training.config import TrainConfig as TrainConfig
from scope_lens.training.export import Saved as Saved
from scope_lens.training.export import gemma_scope_path as gemma_scope_path
from scope_lens.training.export import measure_l0 as measure_l0
from scope_lens.training.export import save_gemma_scope as save_gemma_scope
from scope_lens.training.export import save_suite as save_suite
from scope_lens.training.held_out import HeldOut as HeldOut
from scope_lens.training.kernels.account import MemoryAccount as MemoryAccount
from scope_lens.training.kernels.account import memory_account as memory_account
from scope_lens.training.kernels.codec import SparseCodec as SparseCodec
from scope_lens.training.log import TensorboardLog as TensorboardLog
from scope_lens.training.log import WandbLog as WandbLog
from scope_lens.training.log import read_log as read_log
from scope_lens.training.step_result import StepResult as StepResult
from scope_lens.training.store import ActivationStore as ActivationStore
from scope_lens.training.store.chat import wrap_in_chat as wrap_in_chat
from scope_lens.training.trainer import Trainer as Trainer
