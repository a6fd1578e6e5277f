"""mova: the MoVA model around mova_kernels, as a model of transformers. The import registers its Auto classes."""

try:
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    # The top level of old transformers does not offer this class without torchvision, though it works without.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
except ImportError as error:
    raise ImportError(f'mova needs transformers: pip install "mova-kernels[mova]" ({error})') from error

from . import experts
from .cache import FeatureCache
from .configuration_mova import MoVAConfig
from .convert import official_system_prompt, official_template
from .encoders import VisionEncoder
from .experts import VisionExpert
from .image_processing_mova import MoVAImageProcessor
from .modeling_mova import MoVAForConditionalGeneration, MoVAModel, MoVAPreTrainedModel
from .pipeline import Answer, Fusion, MoVAPipeline
from .pool import ExpertPool, Placement
from .processing_mova import MoVAProcessor
from .router import Route
from .routing import (
    Prompts,
    RoutingPrompt,
    parse_routing,
    parse_routing_official,
    prompts,
    routing_mask,
    routing_prompt,
    selection,
)

AutoConfig.register(MoVAConfig.model_type, MoVAConfig)
AutoModel.register(MoVAConfig, MoVAModel)
AutoModelForImageTextToText.register(MoVAConfig, MoVAForConditionalGeneration)
AutoImageProcessor.register(MoVAConfig, MoVAImageProcessor)
AutoProcessor.register(MoVAConfig, MoVAProcessor)

__all__ = [
    "Answer",
    "ExpertPool",
    "FeatureCache",
    "Fusion",
    "MoVAConfig",
    "MoVAForConditionalGeneration",
    "MoVAImageProcessor",
    "MoVAModel",
    "MoVAPipeline",
    "MoVAPreTrainedModel",
    "MoVAProcessor",
    "Placement",
    "Prompts",
    "Route",
    "RoutingPrompt",
    "VisionEncoder",
    "VisionExpert",
    "experts",
    "official_system_prompt",
    "official_template",
    "parse_routing",
    "parse_routing_official",
    "prompts",
    "routing_mask",
    "routing_prompt",
    "selection",
]
