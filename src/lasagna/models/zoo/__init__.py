"""Real models for the demo, the tests and the benchmarks, read without torch.

``catalog.load(name)`` gives any of them as ONNX. Their weights come from data files inside
packages of the Python index, and nothing of those packages is imported:

- ``efficientnet``: EfficientNet-Lite0, trained on ImageNet; ``photos`` and ``labels`` go with it.
- ``minilm``: the sentence encoder all-MiniLM-L6-v2, trained.
- ``light``: nine classic image networks whose shapes the onnx package ships, without weights.

``torch_checkpoint`` reads the format of the first, ``graph`` is what builds the first two.
"""
