//! Whatever is submitted and cancelled when: the tokens are the model's, and nothing is lost.

use crate::rank::oracle;
use crate::world::{EngineConfig, GATEWAY, World, choice, config, prompt, submit};
use ashlar_scheduler::engine::Event;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Action {
    Submit {
        len: usize,
        salt: u32,
        tokens: u32,
        priority: i32,
        tenant: u64,
    },
    Cancel(u128),
    Advance(usize),
    Wait(u64),
    /// A stage is lost.
    Lose(usize),
}

fn action() -> impl Strategy<Value = Action> {
    let submit = (1usize..90, 0u32..4, 1u32..50, -1i32..2, 0u64..2);
    prop_oneof![
        3 => submit.prop_map(|(len, salt, tokens, priority, tenant)| {
            Action::Submit { len, salt, tokens, priority, tenant }
        }),
        1 => (0u128..40).prop_map(Action::Cancel),
        4 => (1usize..12).prop_map(Action::Advance),
        1 => (1u64..30).prop_map(Action::Wait),
        1 => (0usize..4).prop_map(Action::Lose),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn tokens_never_depend_on_who_else_is_served(
        stages in 1usize..5,
        blocks in 10u32..40,
        seqs in 1usize..9,
        rows in 9u32..80,
        target in 1u64..30,
        second in any::<bool>(),
        actions in prop::collection::vec(action(), 1..60),
    ) {
        let limits = EngineConfig {
            enable_prefix_caching: true,
            max_num_seqs: seqs,
            max_num_batched_tokens: rows,
            step_target_ms: target,
            queue_max: 1000,
            ..config()
        };
        let mut world = World::with(limits, stages, blocks);
        if second {
            world.up(1, stages, blocks);
        }
        let mut asked = Vec::new();
        for action in actions {
            match action {
                Action::Submit { len, salt, tokens, priority, tenant } => {
                    let number = asked.len() as u128;
                    let mut request = submit(number, prompt(len, salt), tokens);
                    request.priority = priority;
                    request.tenant_salt = tenant;
                    world.submit(request);
                    asked.push((len, salt, tokens, true));
                }
                Action::Cancel(number) => {
                    if let Some(entry) = asked.get_mut(number as usize) {
                        entry.3 = false;
                        world.send(Event::Cancel { gateway: GATEWAY, id: choice(number) });
                    }
                }
                Action::Advance(times) => (0..times).for_each(|_| {
                    world.advance();
                }),
                Action::Wait(ms) => world.wait(ms),
                Action::Lose(stage) => world.replace(0, stage % stages, (stages, blocks)),
            }
        }
        world.run();
        prop_assert!(world.engine.is_idle());
        prop_assert!(world.faults.is_empty());
        for replica in world.replicas.values() {
            prop_assert_eq!(replica.rank.known(), 0);
        }
        let capacity = blocks as usize * 16;
        for (number, (len, salt, tokens, kept)) in asked.into_iter().enumerate() {
            let heard = world.heard(choice(number as u128));
            let expected = oracle(&prompt(len, salt), number as u64, (tokens as usize).min(capacity - len));
            if kept {
                prop_assert!(heard.end.is_some());
                prop_assert_eq!(&heard.tokens, &expected);
            }
            prop_assert!(expected.starts_with(&heard.tokens));
        }
    }
}
