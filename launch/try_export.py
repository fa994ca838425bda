"""Uses an exported folder as anyone would who has never heard of mmscale: stock Transformers calls and nothing else.

python launch/try_export.py HUB_FOLDER SHARD.tar
"""

import io
import sys
import tarfile

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

folder, shard = sys.argv[1:3]
with tarfile.open(shard) as tar:
    names = sorted(name for name in tar.getnames() if name.endswith(".jpg"))[:3]
    images = [Image.open(io.BytesIO(tar.extractfile(name).read())) for name in names]
    truths = [tar.extractfile(name.removesuffix(".jpg") + ".txt").read().decode() for name in names]

# The model's code travels in the folder; trust_remote_code lets Transformers run it.
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

inputs = processor(images=images, text=truths, padding=True, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
    similarity = outputs.image_embeds @ outputs.text_embeds.T
    captions = processor.batch_decode(model.generate(pixel_values=inputs["pixel_values"]), skip_special_tokens=True)

for name, truth, caption, row in zip(names, truths, captions, similarity.tolist(), strict=True):
    print(f"{name}\n  truth:    {truth}\n  caption:  {caption}")
    print(f"  cosine with the three true captions: {' '.join(f'{value:.2f}' for value in row)}")
