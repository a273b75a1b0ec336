"""Do generated images help? A classifier is trained with and without them, and tested on images that nobody saw.

`compare` returns, and keeps while it works, plain values only:

    num_steps, batch_size       of each training
    seeds                       [seed]
    images                      {real, synthetic, test: count}
    scores                      {set: {seed as text: {accuracy, per_class, confusion}}}, one per training; `save` gets
                                this, and `done` takes it back
    sets                        {set: ...} for each of "real", "synthetic" and "real + synthetic"
        accuracies              [share], one per seed, in the order of `seeds`
        mean, deviation         over the seeds; the deviation (n - 1) is None for one seed
        per_class               [share], the mean over the seeds, in label order; None for a class without test images
        confusion               [[count]], summed over the seeds; rows are true classes, columns what was said
    difference                  accuracy of "real + synthetic" minus that of "real"
        per_seed                [difference]
        mean, deviation         as above
        low, high               95 % t interval of the mean; None for one seed
        verdict                 helps, harms or open
        sentence                the same for a person
"""
