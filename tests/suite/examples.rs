//! The examples in `examples/` run.

#[path = "../../examples/custom_op.rs"]
mod custom_op;
#[path = "../../examples/embed.rs"]
mod embed;

#[test]
fn a_program_embeds_the_engine_in_under_sixty_lines() {
    embed::main();
    assert!(include_str!("../../examples/embed.rs").lines().count() < 60);
}

#[test]
fn a_program_adds_a_custom_primitive() {
    custom_op::main();
}
