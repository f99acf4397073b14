# What a cluster needs before Python runs. Copy this file to site.sh beside it, and keep the lines that
# apply: every script here reads it, in the job's script and in each of its tasks.

# module load cuda/13.0
# . "$HOME/miniforge3/bin/activate" shardes
# . "$HOME/shardes/.venv/bin/activate"

# Nodes without network: read models and data sets from the cache, which a login node has filled.
# export HF_HOME=/scratch/$USER/huggingface HF_HUB_OFFLINE=1

# A container: the command that runs another one in it.
# container=(apptainer exec --nv --bind /scratch shardes.sif)
