"""A vision encoder of your own as an expert of MoVA, for somebody who uses the whole model (package ``mova``).

An expert is data (what goes in, what comes out, one line for the router) and a function that builds the network. Here
it joins DINOv2 in a small model with random weights. The adapter learns to read it; the expert itself stays frozen.

    python examples/expert_of_your_own.py
"""

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import mova
from mova.demo import small_config, small_model


class EdgeDetector(nn.Module):
    """Stands for your encoder: pixels (B, 3, 64, 64) to a map (B, 16, 8, 8). Tokens (B, 64, 16) would do as well."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.gradients = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(8)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.pool(self.gradients(pixels).abs())


EDGES = mova.VisionExpert(
    "edges", "Follows lines and outlines in drawings.", image_size=64,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), grid=(8, 8), channels=16,
)  # fmt: skip


def small_pipeline() -> mova.MoVAPipeline:
    """A model with the experts DINOv2 and edges."""
    mova.experts.register(EDGES, EdgeDetector)
    demo, processor = small_config(), small_model().processor
    dinov2 = next(expert for expert in demo.experts if expert["name"] == "dinov2")
    config = mova.MoVAConfig(
        demo.text_config,
        demo.text_encoder_config,
        base=demo.base,
        experts=[dinov2, "edges"],
        encoder_sizes={name: demo.encoder_sizes[name] for name in ("clip", "dinov2")},
        adapter_heads=4,
        num_routing_tokens=demo.num_routing_tokens,
        image_token_id=demo.image_token_id,
    )
    processor = mova.MoVAProcessor.for_config(config, processor.tokenizer, processor.question_tokenizer)
    return mova.MoVAPipeline(mova.MoVAForConditionalGeneration(config), processor)


def main() -> None:
    torch.manual_seed(0)
    pipeline = small_pipeline()
    model, processor = pipeline.model, pipeline.processor
    image, question = Image.new("RGB", (96, 96), "white"), "Which shape is it?"
    ImageDraw.Draw(image).polygon([(20, 80), (48, 15), (76, 80)], outline="black", width=4)

    text = processor.conversation(question) + " A triangle."
    inputs = processor(image, text, experts=["edges"], questions=mova.prompts(question, processor.pool).text)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=3e-3)
    for step in range(5):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f}")
    projections = model.adapter.blocks[0].cross_attn
    for name, attention in zip(model.experts.specs, projections, strict=True):
        print(f"{name} learned {attention.proj.weight.norm().item():.4f}")  # zero in the initial state

    answer = pipeline.answer([image], [question], experts=["edges"], max_new_tokens=4)[0]
    print(f"experts {answer.route.experts} gates of block 0 {answer.gates[0].tolist()}")


if __name__ == "__main__":
    main()
