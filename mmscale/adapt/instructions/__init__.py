"""Instruction tuning: shards of instructions made from what other shards hold, and training on the responses alone.

facts.py      what the samples of shards state: captions, classes, answers, counts, attributes, relations
phrasings.py  how each kind of fact may be asked for; some ways are held out from training
cleaning.py   duplicates, lengths, scripts, contradictions
build.py      from shards to shards of instructions, with a report of what was removed
clusters.py   instruction embeddings, how alike they are, and their clusters
task.py       the losses: on the response only, and between phrasings of the same meaning
answering.py  answers written by the model, against the right ones, seen and unseen phrasings apart
command.py    the two methods of `mmscale adapt`
"""
