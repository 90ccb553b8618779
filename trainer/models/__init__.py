"""Models: what all families share, and one folder a family.

To add a model of a new model_type:

1. a folder `trainer/models/NAME/` with `config.py` (reads config.json), `names.py` (Hugging Face names), `sizes.py`
   (released models) and `family.py` (the Family that ties them together), as `qwen3/` does. A model that is more than
   a decoder, or counts differently, adds a LanguageModel and a Costs subclass, as `qwen2_5/` does for its vision tower;
2. a line in `registry.py`;
3. a tiny folder of it in `tests/support/`, and rows with it in the golden tests.

The planner, the trainer and the converter ask the family and know no model by name.
"""
