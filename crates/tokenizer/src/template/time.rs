//! The time that a template shows, given by the caller.

/// A date and time of day, UTC. The default is 1970-01-01T00:00:00Z.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct TemplateTime {
    /// Seconds since 1970-01-01T00:00:00Z.
    unix_seconds: u64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The last second of the year 9999; later times are shown as this one.
const SECONDS_MAX: u64 = 253_402_300_799;

impl TemplateTime {
    /// The time this many seconds after 1970-01-01T00:00:00Z.
    pub fn from_unix_seconds(seconds: u64) -> TemplateTime {
        TemplateTime { unix_seconds: seconds.min(SECONDS_MAX) }
    }

    /// Python's `strftime` for the directives that templates use; others are left as written.
    pub(super) fn format(self, format: &str) -> String {
        let days = self.unix_seconds / 86_400;
        let second_of_day = self.unix_seconds % 86_400;
        let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
        let (year, month, day) = civil_from_days(days);
        let month_name = MONTHS[month as usize - 1];
        let weekday = (days + 4) % 7;
        let day_name = DAYS[weekday as usize];
        let day_of_year = days - days_from_civil(year, 1, 1) + 1;
        let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };

        let mut text = String::with_capacity(format.len() + 16);
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                text.push(c);
                continue;
            }
            let mut directive = chars.next();
            let unpadded = directive == Some('-');
            if unpadded {
                directive = chars.next();
            }
            let two = |n: u64| if unpadded { n.to_string() } else { format!("{n:02}") };
            match directive {
                Some('Y') => text.push_str(&year.to_string()),
                Some('y') => text.push_str(&two(year % 100)),
                Some('m') => text.push_str(&two(month)),
                Some('d') => text.push_str(&two(day)),
                Some('e') => text.push_str(&format!("{day:2}")),
                Some('H') => text.push_str(&two(hour)),
                Some('I') => text.push_str(&two(hour12)),
                Some('M') => text.push_str(&two(minute)),
                Some('S') => text.push_str(&two(second)),
                Some('j') if unpadded => text.push_str(&day_of_year.to_string()),
                Some('j') => text.push_str(&format!("{day_of_year:03}")),
                Some('p') => text.push_str(if hour < 12 { "AM" } else { "PM" }),
                Some('B') => text.push_str(month_name),
                Some('b' | 'h') => text.push_str(&month_name[..3]),
                Some('A') => text.push_str(day_name),
                Some('a') => text.push_str(&day_name[..3]),
                Some('w') => text.push_str(&weekday.to_string()),
                Some('F') => text.push_str(&format!("{year}-{month:02}-{day:02}")),
                Some('T') => text.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
                Some('Z') => text.push_str("UTC"),
                Some('z') => text.push_str("+0000"),
                Some('%') => text.push('%'),
                other => {
                    text.push('%');
                    if unpadded {
                        text.push('-');
                    }
                    text.extend(other);
                }
            }
        }
        text
    }
}

/// Howard Hinnant's `civil_from_days`, for days at or after 1970-01-01.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

/// The inverse of [`civil_from_days`].
fn days_from_civil(year: u64, month: u64, day: u64) -> u64 {
    let year = year - u64::from(month <= 2);
    let shifted_month = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * shifted_month + 2) / 5 + day - 1;
    let year_of_era = year % 400;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    year / 400 * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_follow_python() {
        let time = TemplateTime::from_unix_seconds(1_735_787_045);
        assert_eq!(time.format("%Y-%m-%d %H:%M:%S"), "2025-01-02 03:04:05");
        assert_eq!(
            time.format("%d %b %Y, %A %B %j %I %p %% %-d"),
            "02 Jan 2025, Thursday January 002 03 AM % 2"
        );
        let leap = TemplateTime::from_unix_seconds(1_709_210_096);
        assert_eq!(leap.format("%F %T %a %j"), "2024-02-29 12:34:56 Thu 060");
    }

    #[test]
    fn every_day_survives_a_round_trip() {
        for days in (0..SECONDS_MAX / 86_400).step_by(17) {
            let (year, month, day) = civil_from_days(days);
            assert_eq!(days_from_civil(year, month, day), days);
        }
    }
}
