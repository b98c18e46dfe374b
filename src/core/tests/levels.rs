//! The feature level: only upward, and no further than this build knows.

use super::super::apply::rises;
use super::*;

const KNOWN: u32 = 3;

#[test]
fn a_level_rises_to_what_is_known_and_never_falls() {
    assert_eq!(rises(1, 2, KNOWN), Ok(true));
    assert_eq!(rises(1, 3, KNOWN), Ok(true), "levels may be skipped");
    assert_eq!(rises(2, 2, KNOWN), Ok(false));
    let unknown = Err(Refusal::FeatureLevelUnknown { asked: 4, known: KNOWN });
    assert_eq!(rises(3, 4, KNOWN), unknown);
    assert_eq!(rises(2, 1, KNOWN), Err(Refusal::FeatureLevelPassed { asked: 1, held: 2 }));
    assert_eq!(rises(1, 0, KNOWN), Err(Refusal::FeatureLevelPassed { asked: 0, held: 1 }));
}

/// As if there had been a level before the first.
#[test]
fn a_rise_takes_a_revision_and_is_told() {
    let mut state = State { feature_level: 0, ..State::default() };
    let raise = |level| Command::SetFeatureLevel { level };
    let (applied, events) = apply(&mut state, &ORIGIN, &raise(1));
    assert_eq!(applied.outcome, Ok(Outcome::FeatureLevel(1)));
    assert_eq!(events.as_slice(), [Event::FeatureLevel(1)]);
    assert_eq!(
        (state.feature_level, state.revision, applied.revision),
        (1, Revision(1), Revision(1))
    );
    check_invariants(&state).unwrap();
    // Again, and what must not be: nothing changes.
    for (level, outcome) in [
        (1, Ok(Outcome::FeatureLevel(1))),
        (0, Err(Refusal::FeatureLevelPassed { asked: 0, held: 1 })),
        (u32::MAX, Err(Refusal::FeatureLevelUnknown { asked: u32::MAX, known: FEATURE_LEVEL })),
    ] {
        let before = state.clone();
        let (applied, events) = apply(&mut state, &ORIGIN, &raise(level));
        assert_eq!((applied.outcome, events, &state), (outcome, Events::new(), &before));
    }
}
