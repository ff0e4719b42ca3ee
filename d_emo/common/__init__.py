"""What every part of the package uses: files, digests, processes, figures, options. Imports nothing else of d_emo."""
