"""What should change: data, joint selection, guard, and the `keras_tuner.Oracle`s."""
