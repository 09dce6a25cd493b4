"""Tests that `make test-all` runs and `make test` does not, beside those marked slow where they stand.

Each takes some 7 CPU seconds or more; what stays in `make test` of the same property is named in its line.
"""

STUDIES = {
    "test_readme.py::test_commands_run": "tests/test_docs.py: every command names options that exist",
    "test_certificates.py::test_certificates_of_random_networks": "test_every_layerwise_answer_of_a_deficient_network_...",
    "test_certificates.py::test_certificates_of_random_networks_and_batches": "test_batches: never exact",
    "test_batches.py::test_match_refines_what_the_layers_gave": "test_batches_of_convolutions[relu]",
    "test_batches.py::test_batches_of_convolutions[tanh]": "[relu], [leaky_relu]",
    "test_batches.py::test_flipped_signs_and_labels_are_never_exact[False-1]": "[False-2], [True-1]",
    "test_batches.py::test_dense_layers_give_a_batch_back[True]": "[False]",
    "test_factors.py::test_a_defense_says_nothing_of_a_factor[options2-0.5]": "[options1-0.8], [options3-0.9]",
    "test_factors.py::test_a_defense_says_nothing_of_a_factor[options0-0.7]": "[options1-0.8], [options3-0.9]",
    "test_factors.py::test_a_factor_is_not_taken_for_noise[0.9]": "[0.99], [1.3]",
    "test_factors.py::test_a_softmax_that_is_nearly_saturated[float64-24]": "[float32-18], [float64-28]",
    "test_defenses.py::test_told_of_what_is_missing_the_attack_is_exact[dp_sgd:0.1,0]": "[clip:0.1], [soteria:0.5]",
    "test_defenses.py::test_an_update_of_local_steps_is_matched[2]": "[5]",
    "test_nonlinear.py::test_residual_networks_are_inverted_block_by_block[tanh]": "test_bottlenecks_come_back[leaky_relu]",
    "test_null_coordinates.py::test_leaky_layers_are_closed_by_the_range_of_the_layer_before[float64-0.1]": "[float64-0.2]",
    "test_null_coordinates.py::test_leaky_layers_are_closed_by_the_range_of_the_layer_before[float32-0.2]": "[float32-0.1]",
    "test_oracle.py::test_reported_ranks_are_the_oracles_and_the_papers[cnn3_c2, layer 2]": "[cnn2_c4]",
    "test_pull_back.py::test_what_one_layer_leaves_open_the_one_before_closes[softplus]": "[tanh]",
    "test_scales.py::test_where_no_layer_shows_the_factor_all_multiples_of_an_image_are_open"
    "[1-sigmoid_binary_cross_entropy-match]": "its other cases",
    "test_scales.py::test_a_gradient_of_nothing_fails_alone[2]": "[1]",
    "test_scales.py::test_examples_that_are_summed_or_weighted_come_back_with_their_weights[weights0]": "[weights1]",
    "test_audit.py::test_spectrum_rank_map_and_bound_agree_with_a_dense_jacobian[layers0-1]": "[layers1-1]",
    "test_audit.py::test_shapes_bound_what_leaks[tanh-1-0]": "[relu-2-2]",
    "test_match.py::test_a_batch_comes_back_from_noise[2-labels2]": "[1-labels0], test_several_gradients_of_batches_...",
    "test_guard.py::test_a_sketch_is_never_below_what_leaks[sizes0-1-0.2]": "[sizes1-8-0.01]",
    "test_guard.py::test_a_sketch_is_never_below_the_worst_image[0.3]": "[0.02], [None]",
    "test_baselines.py::test_deep_leakage_of_a_sigmoid_net[dlg]": "[idlg], test_every_attack_keeps_the_contract[dlg]",
    "test_proofs.py::test_patches_in_any_order_are_all_candidates[match]": "[copa]",
    "test_suites.py::test_records_are_the_same_in_two_processes": "test_records_are_the_same_on_eight_devices",
    "test_solver_choice.py::test_every_solver_closes_the_layer[options0]": "[options1], [options2]",
}
