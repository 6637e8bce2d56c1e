/* tick: the guest's own clock, to be watched across a live migration.
 *
 * FILE (argument, on tmpfs) is one line of fixed width, rewritten in place every 0.1 s:
 *   counter, uptime in 1/100 s, longest gap between two ticks in 1/100 s
 * All of it is lost with the guest's memory. A program and not a script: a script at ten ticks a second took 3% of a core. */
#include <fcntl.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static long long now_cs(void)
{
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return t.tv_sec * 100LL + t.tv_nsec / 10000000;
}

int main(int argc, char **argv)
{
    const struct timespec period = {0, 100000000};
    long long counter = 0, last = 0, gap = 0;
    char line[64];
    int file = argc > 1 ? open(argv[1], O_WRONLY | O_CREAT, 0644) : -1;

    if (file < 0)
        return 1;
    for (;;) {
        long long now = now_cs();
        if (last && now - last > gap)
            gap = now - last;
        last = now;
        int size = snprintf(line, sizeof line, "%012lld %012lld %06lld\n", ++counter, now, gap);
        if (pwrite(file, line, size, 0) != size)
            return 1;
        nanosleep(&period, NULL);
    }
}
