"""The stages that produce data: rollout actors with their engines, the replay queue, the reward annotator, the labeller.

replay_queue.py         keeps every part of every group until both learners have used it
group_journal.py        the file in which the replay queue keeps finished groups between two checkpoints
reward_annotator.py     embeds responses with the frozen reward model and scores them with a reward head
labeller.py             asks which of two responses is better, and hands out the labels
rollout_actor.py        turns tickets into groups of responses, with one engine
transformers_engine.py  the engine on transformers
gathering.py            joins calls of several threads into calls for all of them at once
aborts.py               remembers what was aborted before it came
vllm_engine.py          the engine on vLLM
vllm_turns.py           samples the turns of a group on vLLM, for a rollout function of the user's
vllm_drivers.py         two ways to run vLLM: step by step in this process, or in processes of its own
vllm_worker.py          the worker inside vLLM's processes, which copies hidden states out
vllm_weights.py         how weights reach vLLM's workers, and how they are checked there
state_slab.py           the shared memory through which hidden states leave vLLM's worker
vllm_models.py          which models vLLM can run, and what it computes otherwise than transformers
vllm_offline.py         vLLM's offline `LLM`, for `r2m eval generate`
"""
