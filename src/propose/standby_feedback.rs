//! What the hot standbys of all safekeepers need kept on the primary. Pure: the caller brings the clock.
//!
//! Each safekeeper tells the oldest transactions that its standbys may still see; the primary hears the oldest of all. With
//! a slot the primary remembers them when we are gone, so that the last standby has left must be told too, even if
//! nobody knows any more that one was there (spec: postgres clients 9.5).
//!
//! A standby whose safekeeper is gone comes back on another one. Until then what it said keeps counting, for [`GRACE`].

use std::time::{Duration, Instant};

use pgproto::feedback::HotStandbyFeedback;

/// What doesn't change is said again this often, as a standby does.
pub const REPEAT: Duration = Duration::from_secs(10);

/// How long the word of a safekeeper that is gone, or that hasn't been heard yet, is waited for.
pub const GRACE: Duration = Duration::from_secs(30);

/// See the module's page.
#[derive(Debug)]
pub struct StandbyFeedback {
    began: Instant,
    peers: Vec<Peer>,
    /// Last sent on this connection to the primary.
    sent: Option<(HotStandbyFeedback, Instant)>,
}

#[derive(Clone, Copy, Debug)]
enum Peer {
    Unheard,
    Says(HotStandbyFeedback),
    /// And is gone since.
    Said(HotStandbyFeedback, Instant),
}

impl StandbyFeedback {
    /// Nothing was heard yet of so many safekeepers.
    pub fn new(peers: usize, now: Instant) -> Self {
        Self { began: now, peers: vec![Peer::Unheard; peers], sent: None }
    }

    /// A safekeeper told what its standbys need.
    pub fn heard(&mut self, peer: usize, feedback: HotStandbyFeedback) {
        if let Some(entry) = self.peers.get_mut(peer) {
            *entry = Peer::Says(feedback);
        }
    }

    /// The connection to a safekeeper is gone.
    pub fn lost(&mut self, peer: usize, now: Instant) {
        if let Some(entry) = self.peers.get_mut(peer)
            && let Peer::Says(feedback) = *entry
        {
            *entry = Peer::Said(feedback, now);
        }
    }

    /// A new connection to the primary, on which nothing was said.
    pub fn begin(&mut self) {
        self.sent = None;
    }

    /// What all standbys together need now.
    pub fn needed(&self, now: Instant) -> HotStandbyFeedback {
        let told = |peer: &Peer| match *peer {
            Peer::Says(feedback) => Some(feedback),
            Peer::Said(feedback, since) => (now.duration_since(since) < GRACE).then_some(feedback),
            Peer::Unheard => None,
        };
        self.peers.iter().filter_map(told).fold(HotStandbyFeedback::default(), HotStandbyFeedback::merge)
    }

    /// What has to be sent to the primary now, if anything; it counts as sent.
    pub fn due(&mut self, now: Instant) -> Option<HotStandbyFeedback> {
        let needed = self.needed(now);
        let ids = |feedback: &HotStandbyFeedback| (feedback.xmin, feedback.catalog_xmin);
        let nobody = ids(&needed) == (0, 0);
        let is_due = match &self.sent {
            Some((sent, at)) => ids(sent) != ids(&needed) || (!nobody && now.duration_since(*at) >= REPEAT),
            None => true,
        };
        // That nobody needs anything is certain only when everybody said so.
        let unheard = self.peers.iter().any(|peer| matches!(peer, Peer::Unheard));
        let uncertain = nobody && unheard && now.duration_since(self.began) < GRACE;
        if !is_due || uncertain {
            return None;
        }
        self.sent = Some((needed, now));
        Some(needed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xmin(xmin: u64, catalog_xmin: u64) -> HotStandbyFeedback {
        HotStandbyFeedback { timestamp: 7, xmin, catalog_xmin }
    }

    fn ids(feedback: Option<HotStandbyFeedback>) -> Option<(u64, u64)> {
        feedback.map(|feedback| (feedback.xmin, feedback.catalog_xmin))
    }

    #[test]
    fn the_oldest_of_all_is_sent_when_it_changes_and_from_time_to_time() {
        let now = Instant::now();
        let mut all = StandbyFeedback::new(2, now);
        assert_eq!(all.due(now), None, "nobody was heard");
        all.heard(0, xmin(100, 0));
        assert_eq!(ids(all.due(now)), Some((100, 0)));
        all.heard(1, xmin(90, 95));
        assert_eq!(ids(all.due(now)), Some((90, 95)));
        assert_eq!(all.due(now + Duration::from_secs(9)), None);
        assert_eq!(ids(all.due(now + REPEAT)), Some((90, 95)));
        all.heard(1, xmin(0, 0));
        assert_eq!(ids(all.due(now + REPEAT)), Some((100, 0)));
    }

    #[test]
    fn that_the_last_standby_left_is_told_once() {
        let now = Instant::now();
        let mut all = StandbyFeedback::new(1, now);
        all.heard(0, xmin(100, 0));
        assert!(all.due(now).is_some());
        all.heard(0, xmin(0, 0));
        assert_eq!(ids(all.due(now)), Some((0, 0)));
        assert_eq!(all.due(now + REPEAT), None);
    }

    #[test]
    fn what_an_earlier_connection_left_on_the_primary_is_taken_back() {
        let now = Instant::now();
        let mut all = StandbyFeedback::new(2, now);
        all.heard(0, xmin(0, 0));
        assert_eq!(all.due(now), None, "the other one may have standbys");
        assert_eq!(ids(all.due(now + GRACE)), Some((0, 0)), "it doesn't answer");
        all.begin();
        assert_eq!(ids(all.due(now + GRACE)), Some((0, 0)));
        all.heard(1, xmin(0, 0));
        assert_eq!(all.due(now + GRACE), None);
    }

    #[test]
    fn a_standby_has_time_to_move_to_another_safekeeper() {
        let now = Instant::now();
        let mut all = StandbyFeedback::new(2, now);
        all.heard(0, xmin(100, 0));
        all.heard(1, xmin(0, 0));
        assert!(all.due(now).is_some());
        all.lost(0, now);
        all.lost(0, now + Duration::from_secs(20));
        assert_eq!(ids(all.due(now + Duration::from_secs(29))), Some((100, 0)), "again, unchanged");
        all.heard(1, xmin(100, 0));
        assert_eq!(all.due(now + GRACE), None, "it is there");
        all.heard(1, xmin(0, 0));
        assert_eq!(ids(all.due(now + GRACE)), Some((0, 0)));
    }
}
