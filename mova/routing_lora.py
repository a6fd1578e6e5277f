"""The LoRA that makes the language model a router: it is on in the routing pass and off everywhere else."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._checks import check, check_weights
from .checkpoint import read_state
from .ranks import with_zero_times

ROUTING_LORA = "routing"  # the adapter's name in peft, and its folder beside the model
LORA_KEYS = rf"\.lora_\w+\.{ROUTING_LORA}(\.|$)"  # matches the keys of its weights in the model's state
# These options change the language model outside of the routing pass, or need more than the weight file of a LoRA.
_MUST_BE_EMPTY = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens",
)  # fmt: skip
_INITIAL_STATES = (True, False, "gaussian")  # other values change the weights of the language model


class RoutingLoRA:
    """The part of :class:`MoVAForConditionalGeneration` that handles its routing LoRA.

    It uses peft directly, since transformers' own mixin for peft asks for a version that was not released when this was
    written. The language model may also have adapters of the user: a routing pass adds the routing LoRA to the active
    ones. Nothing here changes those adapters otherwise, or whether a parameter requires a gradient.
    """

    config: Any
    lock: Any
    language_model: Any
    _routing_lora_on = False

    def add_routing_lora(self, config: Any) -> None:
        """Give the language model a LoRA for the routing pass.

        Its weights are trainable and get gradients from computations inside :meth:`routing_pass`. Other parameters keep
        their ``requires_grad``.

        Args:
            config: a ``peft.LoraConfig`` for the language model.

        Raises:
            TypeError: ``config`` is not a LoraConfig.
            ValueError: ``config`` would change the language model outside of the routing pass, too, or there is a
                routing LoRA already.
        """
        from peft import inject_adapter_in_model

        _check_config(config)
        check(not self._lora_layers(), "config", "must be of the first routing LoRA; the model has one", config)
        trainable = {parameter: parameter.requires_grad for parameter in self.language_model.parameters()}
        active = {layer: list(layer.active_adapters) for layer in self._tuner_layers().values()}
        with torch.inference_mode(False):  # in which its weights could not be trained
            inject_adapter_in_model(config, self.language_model, adapter_name=ROUTING_LORA)
        # peft has frozen all other parameters and made the new adapter the only active one: both are undone.
        for parameter, wanted in trainable.items():
            parameter.requires_grad_(wanted)
        for layer in self._tuner_layers().values():
            layer._active_adapter = active.get(layer, [])
        for layer in self._lora_layers().values():
            if _refuse_unknown_recomputation not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_refuse_unknown_recomputation)
                layer.register_forward_hook(_join_under_zero3)
        self.config.routing_lora = True

    def load_routing_lora(self, directory: str | Path) -> None:
        """Load a routing LoRA, which replaces the present one, if there is one.

        Its weights have the dtype of the file and are trainable.

        Args:
            directory: written by ``save_pretrained``, or by peft for the language model alone.

        Raises:
            ValueError: weights are missing or unknown, or the config does not suit a routing LoRA.
        """
        from peft import PeftConfig, set_peft_model_state_dict

        state = read_state(Path(directory))
        config = PeftConfig.from_pretrained(str(directory))
        config.inference_mode = False
        _check_config(config)
        for layer in self._lora_layers().values():
            layer.delete_adapter(ROUTING_LORA)
        self.add_routing_lora(config)
        dtypes = {value.dtype for value in state.values()}
        if len(dtypes) == 1:
            with torch.inference_mode(False):
                for name, parameter in self.language_model.named_parameters():
                    if re.search(LORA_KEYS, name):
                        parameter.data = parameter.data.to(*dtypes)
        state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        wrong: Any = set_peft_model_state_dict(self.language_model, state, adapter_name=ROUTING_LORA)
        missing = [key for key in wrong.missing_keys if re.search(LORA_KEYS, key)]
        check_weights("the routing LoRA", missing, wrong.unexpected_keys)

    @contextmanager
    def routing_pass(self) -> Iterator[None]:
        """Switch the routing LoRA on inside the ``with``, so that the language model is the router.

        All threads share the switch, so the model's lock is held meanwhile: other threads wait.

        Raises:
            RuntimeError: peft has removed, merged or disabled the LoRA. Later, the language model raises this error if
                its layers run in reentrant checkpointing that :meth:`gradient_checkpointing_enable` did not set up.
        """
        if not self.config.routing_lora:
            yield
            return
        layers = self._lora_layers()
        if not layers:
            raise RuntimeError(
                "routing_pass must find the routing LoRA in the language model, but it is gone (merge_and_unload takes "
                "all adapters away): call load_routing_lora, or set model.config.routing_lora to False"
            )
        for name, layer in layers.items():
            if layer.merged or layer.disable_adapters:
                state = "merged into the weights" if layer.merged else "disabled"
                raise RuntimeError(f"routing_pass must find peft's adapters at work, but those of {name} are {state}")
        with self.lock, self._routing_lora_switched(True):
            yield

    @contextmanager
    def _routing_lora_switched(self, on: bool) -> Iterator[None]:
        before = self._routing_lora_on
        self._switch_routing_lora(on)
        try:
            yield
        finally:
            self._switch_routing_lora(before)

    def _switch_routing_lora(self, on: bool) -> None:
        # peft's set_adapter and enable_adapters would also change which parameters require a gradient.
        if on != self._routing_lora_on:
            for layer in self._lora_layers().values():
                others = [name for name in layer.active_adapters if name != ROUTING_LORA]
                layer._active_adapter = [*others, ROUTING_LORA] if on else others
            self._routing_lora_on = on

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """As in transformers, but a layer that backward computes again has the LoRA on or off as it was in forward."""

        remembering = partial(self._checkpointed, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, remembering, **kwargs)  # type: ignore[misc]

    def _checkpointed(self, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(partial(_run_switched, self, self._routing_lora_on, function), *args)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in PyTorch, and with the names that ``save_pretrained`` writes, with which ``Trainer`` resumes.

        Raises:
            ValueError: of the state and this model, one has a routing LoRA and the other has none.
        """
        prefixes = [f"language_model.{name}." for name in self._lora_layers()]
        found = any(re.search(LORA_KEYS, key) for key in state_dict)
        rule = "must be of a model without a routing LoRA: call add_routing_lora or load_routing_lora before"
        check(prefixes or not found, "state_dict", rule, "its weights")
        renamed = {}
        for key, value in state_dict.items():
            prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
            if prefix is not None and not key.removeprefix(prefix).startswith(("base_layer.", "lora_")):
                key = f"{prefix}base_layer.{key.removeprefix(prefix)}"
            renamed[key] = value
        if prefixes and not found:
            own = {f"language_model.{name}" for name, _ in self.language_model.named_parameters()}
            lacking = [name for name in own - renamed.keys() if not re.search(LORA_KEYS, name)]
            rule = "must have the weights of the routing LoRA as well; load_routing_lora loads those alone"
            check(lacking, "state_dict", rule, "none")
        return super().load_state_dict(renamed, strict, assign)  # type: ignore[misc]

    def _saved_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the weights of a state to the names of a model without a routing LoRA; the LoRA's own keep theirs."""
        saved = {}
        foreign = []
        for key, value in state.items():
            is_lora = re.search(LORA_KEYS, key)
            if not is_lora and (".lora_" in key or ".modules_to_save." in key):
                foreign.append(key)
            saved[(key if is_lora else key.replace(".base_layer.", ".")).replace("._orig_mod.", ".")] = value
        rule = "must have no weights of adapters but the routing LoRA: save these with peft, or merge them"
        check(not foreign, "state_dict", rule, foreign[:3])
        return saved

    def _save_routing_lora(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        """Write the folder of the routing LoRA, as peft does, from the model's whole state."""
        own = {key: value for key, value in state.items() if re.search(LORA_KEYS, key)}
        rule = "must have the weights of the routing LoRA, since model.config.routing_lora is True"
        check(own, "state_dict", rule, "none")
        directory.mkdir(parents=True, exist_ok=True)
        self.language_model.peft_config[ROUTING_LORA].save_pretrained(str(directory))
        named = {
            re.sub(rf"\.{ROUTING_LORA}(?=\.|$)", "", key.removeprefix("language_model.")): value.contiguous()
            for key, value in own.items()
        }
        save_file(named, directory / "adapter_model.safetensors")

    def _tuner_layers(self) -> dict[str, Any]:
        """The modules of the language model that peft has wrapped, by name."""
        if "peft" not in sys.modules:  # nothing is wrapped before peft is imported
            return {}
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        return {name: module for name, module in self.language_model.named_modules() if isinstance(module, wrappers)}

    def _lora_layers(self) -> dict[str, Any]:
        """The modules of the language model that the routing LoRA changes, by name."""
        layers = self._tuner_layers()
        if not layers:
            return {}
        from peft.tuners.lora import LoraLayer

        return {name: x for name, x in layers.items() if isinstance(x, LoraLayer) and ROUTING_LORA in x.r}


def _run_switched(model: RoutingLoRA, on: bool, function: Callable[..., Any], *args: Any) -> Any:
    with model._routing_lora_switched(on):
        return function(*args)


def _refuse_unknown_recomputation(layer: Any, args: Any) -> None:
    """A hook of the LoRA's layers: refuse to run within an autograd.Function, except under :func:`_run_switched`.

    Such a function, for example reentrant checkpointing, computes the layer again in its backward. The LoRA may be on
    in one of the two computations and off in the other, and the gradients would be wrong without an error.
    """
    if torch.compiler.is_compiling() or ROUTING_LORA not in layer.active_adapters:
        return
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _run_switched.__code__:
        if frame.f_code.co_filename == torch.autograd.function.__file__ and frame.f_code.co_name.startswith("apply"):
            raise RuntimeError(
                "the routing LoRA must not run within a torch.autograd.Function, as reentrant checkpointing has it: "
                "call model.gradient_checkpointing_enable(), or pass use_reentrant=False"
            )
        frame = frame.f_back  # type: ignore[assignment]


def _join_under_zero3(layer: Any, args: Any, output: Tensor) -> Tensor | None:
    """A hook of the LoRA's layers: give its weights zero gradients under DeepSpeed's ZeRO-3 while the LoRA is off.

    Otherwise ZeRO-3 would update them by the gradients of an earlier routing pass.
    """
    if ROUTING_LORA in layer.active_adapters or not torch.is_grad_enabled():
        return None
    names = [f".{name}" for name, parameter in layer.named_parameters() if hasattr(parameter, "ds_id")]
    own = [name for name in names if re.search(LORA_KEYS, name)]
    if not own:
        return None
    if {name.split(".")[1] for name in own} != {"lora_A", "lora_B"} or len(own) != 2:
        raise RuntimeError("a routing LoRA under ZeRO-3 must have the weights lora_A and lora_B alone, got " + str(own))
    first, second = layer.lora_A[ROUTING_LORA], layer.lora_B[ROUTING_LORA]
    row = args[0].flatten(0, -2)[:1].to(first.weight.dtype)
    return with_zero_times(output, second(first(row)))


def _check_config(config: Any) -> None:
    from peft import LoraConfig

    check(isinstance(config, LoraConfig), "config", "must be a peft.LoraConfig", config, TypeError)
    for field in _MUST_BE_EMPTY:
        check(not getattr(config, field, None), f"config.{field}", "must be empty", getattr(config, field, None))
    check(config.bias == "none", "config.bias", "must be 'none'", config.bias)
    init = config.init_lora_weights
    check(init in _INITIAL_STATES, "config.init_lora_weights", f"must be one of {_INITIAL_STATES}", init)
