//! What a node does between its parts.

use std::time::Duration;

use super::*;

#[test]
fn a_deadline_travels_as_the_time_that_is_left() {
    let now = Instant::now();
    let left = |deadline| forwarded("/m", vec![1], deadline).remaining_ms;
    assert!((4_000..=5_000).contains(&left(now + Duration::from_millis(5_000))));
    let (first, then) = (left(now + Duration::from_secs(60)), now.elapsed());
    assert!(first <= 60_000 && then.as_millis() < 60_000);
    assert_eq!(left(now), 0, "nothing is left of a deadline that is past");
}
