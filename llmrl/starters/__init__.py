"""What comes with llmrl besides its code, and the folders that `llmrl new` writes from it.

`recipes`, `data` and `reward_models` are the folders of the repository; a wheel has them here as well.
"""
