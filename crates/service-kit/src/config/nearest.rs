//! The key that somebody meant.

/// What is longer is no slip in writing a key; the comparison takes time with its square.
const KEY_BYTES_MAX: usize = 200;

/// The one of `known` that is nearest to `written`, unless all are far from it.
///
/// Keys have levels (`links.spin_us`): whoever writes only the last one, or puts it elsewhere, is understood, too.
pub fn nearest<'a>(written: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if written.len() > KEY_BYTES_MAX {
        return None;
    }
    let limit = (written.chars().count() / 2).max(2);
    known
        .into_iter()
        .map(|key| (distance_of_keys(written, key), key))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, _)| *distance <= limit)
        .map(|(_, key)| key)
}

fn distance_of_keys(written: &str, key: &str) -> usize {
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let mut distance = distance(written, key).min(distance(&last(written), &last(key)) + 1);
    // Half a word, such as `memory` for `memory_bytes`, is nearer than its missing letters say.
    let (short, long) = if written.len() < key.len() { (written, key) } else { (key, written) };
    if short.len() >= 3 && long.strip_prefix(short).is_some_and(|rest| rest.starts_with('_')) {
        distance = distance.min(1);
    }
    distance
}

/// Letters to insert, remove, replace or swap with their neighbour.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    // Three rows of the table, used in turn.
    let mut before_last = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    let mut row = vec![0; b.len() + 1];
    for (i, left) in a.iter().enumerate() {
        row[0] = i + 1;
        for (j, right) in b.iter().enumerate() {
            let replaced = last[j] + usize::from(left != right);
            let mut best = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i - 1] == *right && *left == b[j - 1] {
                best = best.min(before_last[j - 1] + 1);
            }
            row[j + 1] = best;
        }
        std::mem::swap(&mut before_last, &mut last);
        std::mem::swap(&mut last, &mut row);
    }
    last.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 4] = ["listen", "memory_bytes", "links.spin_us", "scheduler"];

    #[test]
    fn slips_of_the_finger_are_understood() {
        assert_eq!(nearest("lisen", KEYS), Some("listen"));
        assert_eq!(nearest("lsiten", KEYS), Some("listen"));
        assert_eq!(nearest("schedulers", KEYS), Some("scheduler"));
        assert_eq!(distance("lsiten", "listen"), 1);
    }

    #[test]
    fn half_a_key_and_a_key_at_the_wrong_level_are_understood() {
        assert_eq!(nearest("memory", KEYS), Some("memory_bytes"));
        assert_eq!(nearest("spin_us", KEYS), Some("links.spin_us"));
        assert_eq!(nearest("link.spinus", KEYS), Some("links.spin_us"));
    }

    #[test]
    fn what_is_far_from_everything_is_nothing() {
        assert_eq!(nearest("zebra_crossing", KEYS), None);
        assert_eq!(nearest(&"listen".repeat(100_000), KEYS), None);
    }
}
