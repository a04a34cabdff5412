/* A server without a model that stamps what it sends, to hold a load generator's figures against.

   One thread, epoll, a heap of deadlines. Answers POST /v1/completions and /v1/chat/completions with
   a stream of chunks on a fixed beat, GET /health, /v1/models and /metrics. Each chunk carries the
   time at which it was handed to the kernel (`sent_ns`, CLOCK_MONOTONIC), the first one also when
   the request had come in (`received_ns`, the kernel's own stamp where it gives one). Each request has a beat of its own, within a quarter
   of FIRST_MS and GAP_MS. All times are written to LOG: a line for each request, when it came in and when each chunk was sent, so that a client that
   throws the stamps away can be held against them as well.

   usage: mock PORT FIRST_MS GAP_MS LOG       (port 0 takes a free one and prints it) */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/net_tstamp.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 16384
#define BUFFER (1 << 20)

typedef struct {
    int fd, chat, usage, total, sent, prompt, live, closing, begun;
    uint32_t round;
    int64_t received, due, gap;
    char *in;
    size_t have;
    int64_t *sends;
} Connection;

typedef struct { int64_t at; int fd; uint32_t round; } Deadline;

static Connection connections[MAX_CONNECTIONS];
static Deadline heap[MAX_CONNECTIONS * 2];
static int heap_size, epoll_fd;
static int64_t first_ns, gap_ns;
static FILE *log_file;
static volatile sig_atomic_t over;
static long chunks, kernel_stamps;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* --- the heap of deadlines ------------------------------------------------------------------ */

static void push(Deadline d) {
    int i = heap_size++;
    while (i > 0 && heap[(i - 1) / 2].at > d.at) { heap[i] = heap[(i - 1) / 2]; i = (i - 1) / 2; }
    heap[i] = d;
}

static Deadline pop(void) {
    Deadline top = heap[0], last = heap[--heap_size];
    int i = 0;
    for (;;) {
        int child = 2 * i + 1;
        if (child >= heap_size) break;
        if (child + 1 < heap_size && heap[child + 1].at < heap[child].at) child++;
        if (heap[child].at >= last.at) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

/* --- answers -------------------------------------------------------------------------------- */

static void drop(Connection *c) {
    close(c->fd);
    c->live = 0;
    c->round++;
    c->have = 0;
}

static int write_all(Connection *c, const char *data, size_t size) {
    while (size) {
        ssize_t n = send(c->fd, data, size, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) { usleep(50); continue; }
            drop(c);
            return -1;
        }
        data += n;
        size -= n;
    }
    return 0;
}

static void plain(Connection *c, int status, const char *body) {
    char out[2048];
    int n = snprintf(out, sizeof out,
                     "HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                     status, strlen(body), body);
    write_all(c, out, n);
}

static size_t event(char *out, const char *data, int n) {
    return sprintf(out, "%x\r\ndata: %.*s\n\n\r\n", n + 8, n, data);
}

static void write_log(Connection *c) {
    if (!log_file) return;
    fprintf(log_file, "%ld", (long)c->received);
    for (int i = 0; i < c->sent; i++) fprintf(log_file, " %ld", (long)c->sends[i]);
    fputc('\n', log_file);
}

static void beat(Connection *c) {
    char json[512], out[2048];
    size_t size = 0;
    if (!c->begun) {
        const char *head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                           "Transfer-Encoding: chunked\r\n\r\n";
        size += sprintf(out, "%s", head);
        c->begun = 1;
    }
    int last = c->sent + 1 == c->total;
    const char *finish = last ? "\"length\"" : "null";
    int64_t at = now_ns();
    c->sends[c->sent++] = at;
    const char *kind = c->chat ? "chat.completion.chunk" : "text_completion";
    int n = snprintf(json, sizeof json,
        "{\"id\":\"x\",\"object\":\"%s\",\"created\":1,\"model\":\"mock\",\"sent_ns\":%ld,"
        "\"received_ns\":%ld,\"choices\":[{\"index\":0,%s,\"finish_reason\":%s}]}",
        kind, (long)at, (long)c->received,
        c->chat ? "\"delta\":{\"content\":\" word\"}" : "\"text\":\" word\"", finish);
    size += event(out + size, json, n);
    chunks++;
    if (last) {
        if (c->usage) {
            n = snprintf(json, sizeof json,
                "{\"id\":\"x\",\"object\":\"%s\",\"created\":1,\"model\":\"mock\",\"choices\":[],"
                "\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,\"total_tokens\":%d}}",
                kind, c->prompt, c->total, c->prompt + c->total);
            size += event(out + size, json, n);
        }
        size += event(out + size, "[DONE]", 6);
        size += sprintf(out + size, "0\r\n\r\n");
    }
    if (write_all(c, out, size) < 0) return;
    if (last) {
        write_log(c);
        c->total = 0;
        if (c->closing) drop(c);
        return;
    }
    c->due += c->gap;
    push((Deadline){c->due, c->fd, c->round});
}

/* --- requests ------------------------------------------------------------------------------- */

static int number_after(const char *body, const char *name, int otherwise) {
    const char *at = strstr(body, name);
    if (!at) return otherwise;
    at += strlen(name);
    while (*at == '"' || *at == ':' || *at == ' ') at++;
    int value = atoi(at);
    return value > 0 ? value : otherwise;
}

static int prompt_tokens(const char *body) {
    const char *at = strstr(body, "\"prompt\"");
    int count = 1;
    if (at && (at = strchr(at, ':')) && *(at + 1 + (at[1] == ' ')) == '[') {
        for (; *at && *at != ']'; at++) count += *at == ',';
        return count;
    }
    for (at = body; *at; at++) count += *at == ' ';
    return count;
}

/* Between 3/4 and 5/4 of it, so that streams do not march in step. */
static int64_t vary(int64_t ns) { return ns * 3 / 4 + (int64_t)(drand48() * (double)ns / 2); }

static void answer(Connection *c, const char *head, const char *body, int64_t received) {
    c->closing = strcasestr(head, "connection: close") != NULL;
    if (!strncmp(head, "GET ", 4)) {
        const char *path = head + 4;
        if (!strncmp(path, "/v1/models", 10))
            plain(c, 200, "{\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\","
                          "\"created\":1,\"owned_by\":\"me\",\"max_model_len\":32768,"
                          "\"vocab_size\":1000}]}");
        else if (!strncmp(path, "/health", 7) || !strncmp(path, "/ping", 5))
            plain(c, 200, "{}");
        else
            plain(c, 404, "{\"error\":{\"message\":\"no such path\"}}");
        return;
    }
    c->chat = strstr(head, "/chat/") != NULL;
    c->total = number_after(body, "\"max_completion_tokens\"", number_after(body, "\"max_tokens\"", 16));
    c->usage = strstr(body, "include_usage") != NULL;
    c->prompt = prompt_tokens(body);
    c->received = received;
    c->sent = c->begun = 0;
    c->sends = realloc(c->sends, sizeof(int64_t) * c->total);
    c->due = received + vary(first_ns);
    c->gap = vary(gap_ns);
    push((Deadline){c->due, c->fd, c->round});
}

/* When the kernel took the bytes in, where it says so: our own queue is no part of it. */
static int64_t arrived_ns(struct msghdr *message) {
    int64_t now = now_ns();
    for (struct cmsghdr *h = CMSG_FIRSTHDR(message); h; h = CMSG_NXTHDR(message, h)) {
        if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_TIMESTAMPING) continue;
        struct timespec stamp, real;
        memcpy(&stamp, CMSG_DATA(h), sizeof stamp);
        clock_gettime(CLOCK_REALTIME, &real);
        int64_t ago = (real.tv_sec - stamp.tv_sec) * 1000000000LL + real.tv_nsec - stamp.tv_nsec;
        if (stamp.tv_sec && ago >= 0 && ago < 10000000000LL) { kernel_stamps++; return now - ago; }
    }
    return now;
}

static void readable(Connection *c) {
    if (!c->in) c->in = malloc(BUFFER + 1);
    char control[512];
    struct iovec to = {c->in + c->have, BUFFER - c->have};
    struct msghdr message = {.msg_iov = &to, .msg_iovlen = 1,
                             .msg_control = control, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(c->fd, &message, 0);
    int64_t received = arrived_ns(&message);
    if (n <= 0) {
        if (n < 0 && errno == EAGAIN) return;
        drop(c);
        return;
    }
    c->have += n;
    c->in[c->have] = 0;
    char *end = strstr(c->in, "\r\n\r\n");
    if (!end) return;
    *end = 0;
    char *length_at = strcasestr(c->in, "content-length:");
    size_t length = length_at ? strtoul(length_at + 15, NULL, 10) : 0;
    size_t whole = (end - c->in) + 4 + length;
    if (c->have < whole) { *end = '\r'; return; }
    char *body = end + 4;
    if (strcasestr(c->in, "expect: 100-continue")) plain(c, 417, "{}");
    c->have = 0; /* one request at a time on a connection */
    answer(c, c->in, body, received);
}

static void accept_all(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
        if (fd < 0) return;
        if (fd >= MAX_CONNECTIONS) { close(fd); continue; }
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        int stamps = SOF_TIMESTAMPING_RX_SOFTWARE | SOF_TIMESTAMPING_SOFTWARE;
        setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPING, &stamps, sizeof stamps);
        Connection *c = &connections[fd];
        c->fd = fd;
        c->live = 1;
        c->have = c->total = 0;
        c->round++;
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 8192)) { perror("mock"); exit(1); }
    socklen_t size = sizeof a;
    getsockname(fd, (struct sockaddr *)&a, &size);
    printf("ready on %d\n", ntohs(a.sin_port));
    fflush(stdout);
    return fd;
}

static void stop(int s) { (void)s; over = 1; }

/* Until the next deadline, to the ns: a wait in whole ms would have to spin through the rest. */
static struct timespec wait_time(void) {
    int64_t left = heap_size ? heap[0].at - now_ns() : 1000000000;
    if (left < 0) left = 0;
    return (struct timespec){left / 1000000000, left % 1000000000};
}

int main(int argc, char **argv) {
    if (argc < 4) { fprintf(stderr, "usage: mock PORT FIRST_MS GAP_MS [LOG]\n"); return 2; }
    first_ns = (int64_t)(atof(argv[2]) * 1e6);
    gap_ns = (int64_t)(atof(argv[3]) * 1e6);
    if (argc > 4) log_file = fopen(argv[4], "w");
    struct sigaction action = {.sa_handler = stop};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    struct rlimit files = {MAX_CONNECTIONS, MAX_CONNECTIONS};
    setrlimit(RLIMIT_NOFILE, &files);
    epoll_fd = epoll_create1(0);
    int listener = listen_on(atoi(argv[1]));
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener}, events[1024];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
    while (!over) {
        struct timespec wait = wait_time();
        int n = epoll_pwait2(epoll_fd, events, 1024, &wait, NULL);
        for (int i = 0; i < n; i++) {
            if (events[i].data.fd == listener) accept_all(listener);
            else if (connections[events[i].data.fd].live) readable(&connections[events[i].data.fd]);
        }
        while (heap_size && heap[0].at <= now_ns()) {
            Deadline d = pop();
            Connection *c = &connections[d.fd];
            if (c->live && c->round == d.round && c->total) beat(c);
        }
    }
    if (log_file) fclose(log_file);
    fprintf(stderr, "%ld chunks, %ld kernel stamps\n", chunks, kernel_stamps);
    return 0;
}
