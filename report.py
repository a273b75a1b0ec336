"""One HTML page that shows what evaluate_images.py found: self-contained, for a browser, a printer and a phone.

The page is made from a dict, the same that report.json holds, and this is the one home of its shape. It is plain:
dicts, lists, texts, finite numbers, None. A key may be absent everywhere; what would be shown from it is left out.
None stands for a figure that could not be computed. Shares are from 0 to 1. Classes are named by the text of their
folder and stand in label order. Keys that are not listed here (digests, for example) are passed over.

    evaluated
        checkpoint, step        file name and training step of the model
        synthetic_path          the folder with the generated images
        made_with               what generate.py wrote beside them: step, cond_scale, sampler, sampling_timesteps, seed
        split, image_size       random or contiguous; pixels
        images                  {synthetic, training, test: count}
        images_per_class        {class: {synthetic, training, test: count}}, of all classes
    warnings                    [sentence], what the figures must be read with
    why                         {name of a part below: sentence}, why that part is not there though it was asked for
    latents, inception          the same shape twice: in latent space, and with Inception features
        images, test_images     how many synthetic (and as many training) images, against how many test images
        directions, directions_per_class    principal directions of the Fréchet distance; None: all
        neighbours, subset_size, num_subsets
        synthetic, training     the figures of either, against the test images; training images are the yardstick
            frechet, frechet_mean, kernel, kernel_deviation, kernel_mean        ..._mean: over the classes
            frechet_per_class, kernel_per_class     {class: distance}
            precision, recall, density, coverage
        recognition             {synthetic, test: share nearest to the mean of their own class}, latents only
    memorisation                distances in latent space to the nearest training image
        distances, median       of each synthetic image
        test_distances, test_median     of each test image
        threshold               the distance that 5 % of the test images stay below
        near_share, near_share_limit    share of synthetic images below it; what chance alone seldom exceeds
        nearer_to_training, nearer_to_training_limit    share nearer to a training than to a test image; likewise
        per_class               {class: {median, test_median, near_share}}
        pairs                   [{synthetic, training: class/file, distance}], the closest
        picture, why_no_picture key of the picture of the pairs in `pictures`, or a sentence
        same_content            [{synthetic, same_as: class/file, kind: training, test or synthetic}], equal files
    classifier                  as classifier.compare returns it, and what the script adds: image_size
    sweep
        points                  [{checkpoint, step, guidance, images, near_share, nearer_to_training, recognition, and
                                the figures of latents.synthetic}]
        training                the same figures of as many training images
        best                    one of the points, or None
    settings                    {setting: value}
"""
