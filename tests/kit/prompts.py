"""Twenty prompts of different kinds and lengths."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "The three primary colours are red,",
    "In 1969, the first human",
    "import numpy as np\n\n# Compute the mean of each column\n",
    "Question: What is 17 plus 25?\nAnswer:",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8, 13,",
    "The quick brown fox",
    "List three reasons why exercise is good for you:\n1.",
    "Shakespeare wrote many plays, among them",
    "A recipe for pancakes: mix flour,",
    "The opposite of hot is",
    "In physics, the second law of thermodynamics says that",
    "<|im_start|>user\nWrite a haiku about autumn.<|im_end|>\n<|im_start|>assistant\n",
    "Der schnelle braune Fuchs springt über",
    "The history of computing began long before the electronic computer. Mechanical devices such as the abacus, "
    "the astrolabe and, much later, the difference engine of Charles Babbage",
)
