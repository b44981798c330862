//! Sequences that are computed again for an audit.

use crate::world::{EngineConfig, World, choice, config, prompt, submit};
use ashlar_protocol::serving::Submit;
use ashlar_scheduler::audit::{self, AuditId, Transcript};
use ashlar_scheduler::engine::Event;
use ashlar_vocabulary::{ReplicaId, SequenceId};

fn audited() -> EngineConfig {
    EngineConfig { audit_per_million: 1_000_000, ..config() }
}

fn repeat(world: &mut World, replica: u32, submit: Submit) {
    let (audit, replica) = (AuditId(1), ReplicaId(replica));
    world.send(Event::Repeat { audit, replica, submit: Box::new(submit), logits_from: 39 });
}

fn begun(world: &World) -> Vec<SequenceId> {
    let begun = |event: &audit::Event| match event {
        audit::Event::Begun { sequence, .. } => Some(*sequence),
        _ => None,
    };
    world.audits.iter().filter_map(begun).collect()
}

fn ended(world: &World) -> Vec<(SequenceId, Option<Transcript>)> {
    let ended = |event: &audit::Event| match event {
        audit::Event::Ended { sequence, transcript } => Some((*sequence, transcript.clone())),
        _ => None,
    };
    world.audits.iter().filter_map(ended).collect()
}

#[test]
fn an_audited_sequence_is_said_to_begin_and_to_end_with_all_its_tokens() {
    let mut world = World::with(audited(), 2, 64);
    let id = world.submit(submit(1, prompt(40, 1), 5));
    world.run();
    let transcript = Transcript {
        replica: ReplicaId(0),
        submit: Box::new(submit(1, prompt(40, 1), 5)),
        generated: world.heard[&id].tokens.clone(),
    };
    assert_eq!(begun(&world), [SequenceId(1)]);
    assert_eq!(ended(&world), [(SequenceId(1), Some(transcript))]);
    let plans = &world.replicas[&0].plans;
    let new = plans.iter().flat_map(|plan| &plan.new_sequences).next().expect("a new sequence");
    assert_eq!(new.audit_logits_from, Some(39));
}

#[test]
fn a_share_is_audited_and_always_the_same_choices() {
    let sampled = || {
        let mut world = World::with(EngineConfig { audit_per_million: 250_000, ..config() }, 1, 256);
        for number in 0..400 {
            world.submit(submit(number, prompt(8, number as u32), 1));
            world.run();
        }
        begun(&world)
    };
    let once = sampled();
    assert!((70..130).contains(&once.len()), "{}", once.len());
    assert_eq!(once, sampled());
    let mut world = World::with(config(), 1, 64);
    world.submit(submit(1, prompt(8, 1), 1));
    world.run();
    assert!(world.audits.is_empty());
}

#[test]
fn a_repetition_is_computed_whole_on_its_replica_alone_and_nobody_is_told_its_tokens() {
    let mut world = World::with(config(), 1, 64);
    world.up(1, 1, 64);
    // Cached on both, so that a request would be computed in part only.
    for number in 1..5 {
        world.submit(submit(number, prompt(40, 1), 2));
    }
    world.run();
    let computed = |world: &World| [0, 1].map(|replica| world.replicas[&replica].rank.computed);
    let before = computed(&world);
    repeat(&mut world, 1, submit(9, prompt(40, 1), 1));
    world.run();
    assert_eq!(computed(&world), [before[0], before[1] + 40]);
    assert!(!world.heard.contains_key(&choice(9)));
    assert!(matches!(ended(&world)[..], [(_, Some(_))]));
    assert!(world.engine.is_idle());
}

#[test]
fn a_repetition_goes_with_its_replica_and_one_for_a_replica_that_is_gone_is_refused() {
    let mut world = World::with(config(), 1, 64);
    world.up(1, 1, 64);
    repeat(&mut world, 1, submit(9, prompt(40, 1), 1));
    world.down(1, "gone");
    assert!(matches!(ended(&world)[..], [(_, None)]));
    assert!(world.engine.is_idle());
    repeat(&mut world, 1, submit(10, prompt(40, 1), 1));
    assert_eq!(world.audits.last(), Some(&audit::Event::Refused { audit: AuditId(1) }));
    assert!(world.engine.is_idle());
}

#[test]
fn a_cancelled_sequence_ends_its_audit() {
    let mut world = World::with(audited(), 1, 64);
    let id = world.submit(submit(1, prompt(40, 1), 50));
    world.advance();
    world.send(Event::Cancel { gateway: crate::world::GATEWAY, id });
    assert_eq!(ended(&world), [(SequenceId(1), None)]);
}
