/* Pages of HDCS. Everything that comes from the record becomes text of a node, never markup. */
(function () {
    'use strict';

    var page = document.querySelector('[data-hdcs]'),
        prefix = document.getElementById('url_prefix').value,
        base = prefix ? '/' + prefix.replace(/^\/+|\/+$/g, '') : '',
        REFRESH_MS = 2000;

    // --- nodes

    function el(tag, attributes, children) {
        var node = document.createElement(tag);
        Object.keys(attributes || {}).forEach(function (name) {
            if (attributes[name] !== null && attributes[name] !== undefined) {
                node.setAttribute(name, attributes[name]);
            }
        });
        [].concat(children === undefined || children === null ? [] : children).forEach(function (child) {
            node.append(child instanceof Node ? child : String(child));
        });
        return node;
    }

    function html(node) {
        return node.outerHTML;
    }

    function link(path, text, title) {
        return el('a', {href: base + path, title: title}, text);
    }

    function none() {
        return el('span', {'class': 'value-missing'}, '—');
    }

    function cut(text, title) {
        return el('div', {'class': 'hdcs-cut', title: title || text}, text);
    }

    function sub(text, title) {
        return el('span', {'class': 'hdcs-sub hdcs-cut', title: title || text}, text);
    }

    // --- values as people read them

    function duration(seconds) {
        var s = Math.max(0, Math.round(seconds)), m = Math.floor(s / 60), h = Math.floor(m / 60), d = Math.floor(h / 24);
        if (s < 60) { return s + ' s'; }
        if (m < 60) { return m + ' min' + (m < 10 && s % 60 ? ' ' + s % 60 + ' s' : ''); }
        if (h < 48) { return h + ' h' + (m % 60 ? ' ' + m % 60 + ' min' : ''); }
        return d + ' d' + (h % 24 ? ' ' + h % 24 + ' h' : '');
    }

    function ago(iso) {
        if (!iso) { return none(); }
        var at = new Date(iso), seconds = (Date.now() - at) / 1000;
        var text = seconds < 5 ? 'just now' : duration(seconds > 600 ? Math.round(seconds / 60) * 60 : seconds) + ' ago';
        return el('time', {datetime: iso, title: at.toLocaleString(), 'class': 'text-nowrap'}, text);
    }

    function bytes(count) {
        if (count === null || count === undefined) { return '—'; }
        var units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'], n = 0;
        while (count >= 1024 && n < units.length - 1) { count /= 1024; n += 1; }
        return (count >= 100 || n === 0 ? Math.round(count) : count.toFixed(1)) + ' ' + units[n];
    }

    function mib(count) {
        return bytes(count * 1048576);
    }

    var COLOURS = {
        running: 'task-state-started', done: 'text-bg-success', up: 'text-bg-success', failed: 'text-bg-danger',
        lost: 'text-bg-danger', critical: 'text-bg-danger', error: 'text-bg-danger', warning: 'text-bg-warning',
        draining: 'text-bg-warning', published: 'task-state-started'
    };

    function badge(state, colours) {
        return el('span', {'class': 'badge ' + ((colours || COLOURS)[state] || 'text-bg-secondary')}, state);
    }

    var DESKTOP = {running: 'text-bg-success', failed: 'text-bg-danger', stopped: 'text-bg-secondary',
        saved: 'text-bg-secondary', suspended: 'text-bg-warning'};

    function desktopBadge(state) {
        return badge(state, new Proxy(DESKTOP, {get: function (known, s) { return known[s] || 'task-state-started'; }}));
    }

    function bar(percent, state) {
        var shown = Math.round(state === 'done' ? 100 : percent || 0);
        var inner = el('div', {'class': 'progress-bar is-' + state, style: 'width: ' + shown + '%'});
        return el('div', {'class': 'hdcs-bar'}, [
            el('div', {'class': 'progress', role: 'progressbar', 'aria-valuenow': shown, 'aria-valuemin': 0,
                'aria-valuemax': 100, 'aria-label': 'progress'}, inner),
            el('span', {'class': 'hdcs-percent'}, shown + ' %')
        ]);
    }

    function took(operation) {
        if (operation.seconds !== null) { return duration(operation.seconds); }
        return duration((Date.now() - new Date(operation.created_at)) / 1000);
    }

    function told(operation) {
        if (operation.error) {
            return el('span', {'class': 'hdcs-sub hdcs-cut hdcs-error', title: operation.error.message || ''},
                operation.error.message || operation.error.code);
        }
        var left = operation.eta_s ? ', about ' + duration(operation.eta_s) + ' left' : '';
        return sub(operation.phase + left);
    }

    // --- fresh or not

    function status(fine, text) {
        document.getElementById('hdcs-dot').className = 'status-dot ' + (fine ? 'status-dot-live' : 'status-dot-error');
        document.getElementById('hdcs-status').textContent = text;
    }

    function updated() {
        status(true, 'Updated ' + new Date().toLocaleTimeString());
    }

    function refused(answer) {
        status(false, answer && answer.error ? answer.error : 'No answer; trying again');
    }

    function every(look) {
        setInterval(function () { if (!document.hidden) { look(); } }, REFRESH_MS);
    }

    // --- tables that the record pages, sorts and filters

    function table(path, columns, words, filters, order) {
        var show = new URLSearchParams(location.search).get('show') || filters[0][0],
            search = new URLSearchParams(location.search).get('search') || '',
            waiting = false,
            made;
        var buttons = filters.map(function (filter) {
            var button = el('button', {'class': 'task-state-filter', type: 'button', 'data-show': filter[0]}, filter[1]);
            button.addEventListener('click', function () { show = filter[0]; mark(); made.ajax.reload(); });
            return button;
        });
        function mark() {
            buttons.forEach(function (button) {
                var mine = button.getAttribute('data-show') === show;
                button.classList.toggle('active', mine);
                button.setAttribute('aria-pressed', mine);
            });
        }
        document.getElementById('hdcs-filters').append.apply(document.getElementById('hdcs-filters'), buttons);
        mark();
        $.fn.dataTable.ext.errMode = 'none';
        made = $('#hdcs-table').DataTable({
            serverSide: true, searchDelay: 300, scrollX: true, scrollCollapse: true, autoWidth: false,
            dom: "frt<'dt-footer'lip>", lengthMenu: [15, 30, 50, 100], pageLength: 15, search: {search: search},
            rowId: 'id', order: order, columns: columns,
            language: {
                lengthMenu: '_MENU_', info: 'Showing _START_ to _END_ of _TOTAL_ ' + words.many,
                infoEmpty: 'No ' + words.many + ' to show', infoFiltered: '(of _MAX_ in all)',
                search: '<span class="visually-hidden">Search</span>', searchPlaceholder: words.search,
                emptyTable: words.empty, zeroRecords: 'No ' + words.many + ' match.', loadingRecords: 'Loading…'
            },
            ajax: {
                url: base + path, data: function (asked) { asked.show = show; },
                error: function (xhr) { waiting = false; refused(xhr.responseJSON); }
            }
        });
        made.on('xhr', function (_event, _settings, answer) { waiting = false; if (answer) { updated(); } });
        every(function () {
            if (!waiting) { waiting = true; made.ajax.reload(null, false); }
        });
    }

    function column(name, title, show, more) {
        return Object.assign({
            name: name, title: title, data: null,
            render: function (_data, type, row) { return type === 'display' ? html(el('div', {}, show(row))) : ''; }
        }, more || {});
    }

    var FIXED = {orderable: false}, NUMBER = {className: 'hdcs-number'};

    function desktops() {
        table('/desktops/data', [
            column('name', 'Desktop', function (row) {
                var tags = row.tags.length ? [sub(row.tags.join(', '))] : [];
                return [link('/operations?search=' + encodeURIComponent(row.name), row.name, 'Its operations')].concat(tags);
            }),
            column('state', 'State', function (row) {
                var at = row.operation;
                if (!at) { return desktopBadge(row.state); }
                return [desktopBadge(row.state), el('span', {'class': 'hdcs-sub'},
                    link('/operation/' + at.id, at.kind + ' ' + Math.round(at.percent) + ' %'))];
            }),
            column('home', 'Domain node', function (row) { return row.home; }),
            column('server_node', 'Server node', function (row) {
                return row.server_node ? link('/worker/' + encodeURIComponent(row.home + '@' + row.server_node),
                    row.server_node, 'Its worker') : none();
            }),
            column('ip', 'IP', function (row) { return row.ip || none(); }),
            column('profile', 'Profile', function (row) { return row.profile; }),
            column('owner', 'Owner', function (row) { return row.owner ? cut(row.owner) : none(); }),
            column('active_at', 'Idle', function (row) {
                return row.idle_s === null ? none() : row.idle_s < 1 ? 'in use' : duration(row.idle_s);
            }, NUMBER),
            column('proven', 'Last proven backup', function (row) {
                if (row.proven) { return ago(row.proven.taken_at); }
                return el('span', {'class': 'hdcs-quiet'}, row.backups ? 'none of ' + row.backups : 'no backup');
            }, FIXED)
        ], {
            many: 'desktops', search: 'name, owner, IP, server node',
            empty: 'There are no desktops yet. Make some: hdcs vm clone IMAGE --count 10'
        }, [['', 'All'], ['running', 'Running'], ['suspended', 'Suspended'], ['saved', 'Saved'], ['stopped', 'Stopped'],
            ['failed', 'Failed']], [[0, 'asc']]);
    }

    function operations() {
        table('/operations/data', [
            column('kind', 'Operation', function (row) {
                return [link('/operation/' + row.id, row.kind, row.id), row.about ? sub(row.about) : ''];
            }),
            column('subject', 'On', function (row) {
                var inside = row.children ? [sub(row.children.ended + ' of ' + row.children.all + ' ended')] : [];
                return [cut(row.subject || '—')].concat(inside);
            }),
            column('state', 'State', function (row) {
                var more = row.needs_operator ? [el('span', {'class': 'hdcs-sub hdcs-error'}, 'needs an operator')] : [];
                return [badge(row.state)].concat(more);
            }),
            column('percent', 'Progress', function (row) { return [bar(row.percent, row.state), told(row)]; },
                {width: '20%'}),
            column('requested_by', 'Who and why', function (row) {
                return [cut(row.requested_by || '—'), row.reason ? sub(row.reason) : ''];
            }),
            column('created_at', 'Asked', function (row) { return ago(row.created_at); }),
            column('took', 'Took', function (row) { return took(row); }, {className: 'hdcs-number', orderable: false}),
            column('task', 'Task', function (row) {
                return row.task ? link('/task/' + encodeURIComponent(row.task), row.task.slice(0, 8)) : none();
            }, FIXED)
        ], {
            many: 'operations', search: 'VM, kind, who, why or id',
            empty: 'Nothing was asked for yet.'
        }, [['all', 'All'], ['live', 'Live'], ['done', 'Done'], ['failed', 'Failed'], ['cancelled', 'Cancelled'],
            ['operator', 'Needs an operator']], [[5, 'desc']]);
    }

    // --- pages drawn whole

    function card(title, content) {
        return el('section', {'class': 'detail-card hdcs-card mw-100'}, [el('h2', {}, title), content]);
    }

    function rows(heads, lines, empty) {
        if (!lines.length) { return el('p', {'class': 'hdcs-empty'}, empty); }
        return el('table', {'class': 'table tasks-table align-middle'}, [
            el('thead', {}, el('tr', {}, heads.map(function (head) {
                return el('th', {'class': head[1] || null}, head[0]);
            }))),
            el('tbody', {}, lines.map(function (line) {
                if (line instanceof Node) { return line; }
                return el('tr', {}, line.map(function (cell, n) {
                    return el('td', {'class': heads[n][1] || null}, cell);
                }));
            }))
        ]);
    }

    function facts(pairs) {
        return el('dl', {'class': 'detail-list mb-0'}, pairs.filter(Boolean).map(function (pair) {
            return el('div', {'class': 'detail-row'}, [el('dt', {}, pair[0]), el('dd', {}, pair[1])]);
        }));
    }

    function drawn(path, draw) {
        var waiting = false, body = document.getElementById('hdcs-body');
        function look() {
            if (waiting) { return; }
            waiting = true;
            $.ajax({url: base + (typeof path === 'function' ? path() : path), dataType: 'json'}).done(function (answer) {
                body.replaceChildren.apply(body, draw(answer, look));
                updated();
            }).fail(function (xhr) { refused(xhr.responseJSON); }).always(function () { waiting = false; });
        }
        look();
        every(look);
    }

    function attempts(step) {
        return step.history.map(function (tried) {
            var how = tried.error ? tried.error.message : 'done';
            var time = tried.started_at && tried.ended_at ? ' in ' + duration(tried.ended_at - tried.started_at) : '';
            return el('div', {'class': tried.error ? 'hdcs-error' : null},
                'attempt ' + tried.attempt + (tried.node ? ' on ' + tried.node : '') + time + ': ' + how);
        });
    }

    function operation() {
        drawn('/operation/' + page.getAttribute('data-subject') + '/data', function (seen) {
            document.getElementById('hdcs-title').textContent = seen.kind + (seen.subject ? ' · ' + seen.subject : '');
            var parts = [card('Summary', facts([
                ['State', [badge(seen.state), seen.needs_operator ? ' needs an operator' : '']],
                ['Progress', [bar(seen.percent, seen.state), told(seen)]],
                ['Who', seen.requested_by || '—'], ['Why', seen.reason || '—'],
                ['Asked', ago(seen.created_at)], ['Took', took(seen)],
                seen.error && ['Error', el('span', {'class': 'hdcs-error'}, seen.error.message)],
                seen.error && seen.error.next && ['What next', seen.error.next],
                seen.parent_id && ['Part of', link('/operation/' + seen.parent_id, seen.parent_id)],
                ['Id', el('code', {'class': 'text-body-secondary'}, seen.id)]
            ]))];
            if (seen.children.length) {
                parts.push(card(seen.children.length + ' parts', rows(
                    [['On'], ['State'], ['Progress'], ['Took', 'hdcs-number']],
                    seen.children.map(function (child) {
                        return [link('/operation/' + child.id, child.subject || child.kind), badge(child.state),
                            [bar(child.percent, child.state), told(child)], took(child)];
                    }), '')));
            }
            if (seen.steps.length || !seen.children.length) {
                parts.push(card('Steps', rows(
                    [['#'], ['Step'], ['State'], ['Queue'], ['Server node'], ['What became of it']],
                    seen.steps.map(function (step) {
                        var name = step.attempt ? link('/task/' + encodeURIComponent(step.id + '.' + step.attempt),
                            step.name, 'Its task') : step.name;
                        return [step.seq, name, badge(step.state), step.queue, step.node || none(), attempts(step)];
                    }), 'It has not begun.')));
            }
            return parts;
        });
    }

    function metric(label, value, more, kind) {
        return el('article', {'class': 'metric-card' + (kind ? ' metric-card-' + kind : '')}, [
            el('p', {'class': 'metric-label'}, label), el('p', {'class': 'metric-value'}, value),
            el('p', {'class': 'metric-sub'}, more)
        ]);
    }

    function used(free, all, show) {
        if (!all) { return none(); }
        var percent = 100 * (all - free) / all;
        return [bar(percent, percent > 90 ? 'failed' : 'running'),
            sub(show(all - free) + ' of ' + show(all))];
    }

    function plain(count) {
        return String(count);
    }

    var chosen = new URLSearchParams(location.search).get('profile') || '';

    function profiles(seen, look) {
        var select = el('select', {'class': 'form-select form-select-sm', 'aria-label': 'Profile'},
            seen.profiles.map(function (name) {
                return el('option', seen.capacity && name === seen.capacity.profile ? {selected: ''} : {}, name);
            }));
        select.addEventListener('change', function () { chosen = select.value; look(); });
        return select;
    }

    function nodeRows(seen) {
        var fits = seen.capacity ? seen.capacity.domain_nodes : {}, lines = [];
        seen.domain_nodes.forEach(function (pool) {
            var mine = seen.server_nodes.filter(function (node) { return node.domain_node === pool.name; });
            var room = fits[pool.name] || {vms: '—', n_plus_one: '—', server_nodes: {}};
            var guests = mine.reduce(function (sum, node) { return sum + node.guests; }, 0);
            lines.push(el('tr', {'class': 'hdcs-group'}, [
                el('td', {}, pool.name), el('td', {}, pool.server_nodes.length + ' in the pool'),
                el('td', {'class': 'hdcs-number'}, guests), el('td', {}, used(pool.free_vcpus, pool.vcpus, plain)),
                el('td', {}, used(pool.free_memory_mib, pool.memory_mib, mib)),
                el('td', {'class': 'hdcs-number'}, [room.vms, sub('N+1: ' + room.n_plus_one)]), el('td', {}, '')
            ]));
            mine.forEach(function (node) {
                var own = room.server_nodes[node.name];
                lines.push([
                    link('/worker/' + encodeURIComponent(node.worker), node.name, 'Its worker, ' + node.worker),
                    [badge(node.state), sub(node.ip)], node.guests, used(node.free_vcpus, node.vcpus, plain),
                    used(node.free_memory_mib, node.memory_mib, mib),
                    own ? [own.vms, own.limit ? sub(own.limit) : ''] : none(), ago(node.observed_at)
                ]);
            });
        });
        return lines;
    }

    function storage(seen) {
        return seen.domain_nodes.map(function (pool) {
            return [pool.name, used(pool.storage_free_bytes, pool.storage_total_bytes, bytes),
                bytes(pool.disk_promised_bytes),
                used(pool.ports_free, pool.port_last - pool.port_first + 1, plain), pool.ports_cooling];
        });
    }

    function alarms(seen) {
        return seen.alarms.map(function (alarm) {
            var known = alarm.acknowledged_by ? sub('acknowledged by ' + alarm.acknowledged_by +
                (alarm.note ? ': ' + alarm.note : '')) : '';
            return [ago(alarm.raised_at), badge(alarm.severity), [alarm.kind, sub(alarm.subject)],
                [alarm.message, alarm.next ? sub(alarm.next) : '', known]];
        });
    }

    function events(seen) {
        return seen.events.map(function (event) {
            return [ago(event.at), event.kind, event.subject, event.message];
        });
    }

    function summary(seen) {
        var counts = seen.counts, desktops = counts.desktops, room = seen.capacity,
            all = Object.values(desktops).reduce(function (sum, count) { return sum + count; }, 0),
            down = counts.server_nodes.all - counts.server_nodes.up;
        return el('section', {'class': 'metric-grid', 'aria-label': 'Summary'}, [
            metric('Desktops running', desktops.running || 0, 'of ' + all + (desktops.failed ? ', ' + desktops.failed +
                ' failed' : ''), desktops.failed ? 'danger' : 'success'),
            metric('Server nodes', counts.server_nodes.up, down ? down + ' not in their pool' : 'all in their pools',
                down ? 'danger' : 'success'),
            metric('More desktops fit', room ? room.vms : '—', room ? 'of profile ' + room.profile + '; with a server ' +
                'node kept free: ' + room.n_plus_one : 'no profile', ''),
            metric('Operations at work', counts.operations.live, counts.operations.operator ?
                counts.operations.operator + ' failed and need an operator' : 'none needs an operator',
                counts.operations.operator ? 'danger' : 'active')
        ]);
    }

    function dataCenter() {
        drawn(function () {
            return '/data-center/data' + (chosen ? '?profile=' + encodeURIComponent(chosen) : '');
        }, function (seen, look) {
            return [
                summary(seen),
                card('Alarms', rows([['Since'], ['Severity'], ['What'], ['Message and what next']], alarms(seen),
                    'No alarm stands.')),
                card(['Domain nodes and server nodes; what fits of profile', profiles(seen, look)], rows(
                    [['Node'], ['State'], ['Desktops', 'hdcs-number'], ['vCPUs'], ['Memory'], ['More fit', 'hdcs-number'],
                        ['Seen']], nodeRows(seen), 'There is no domain node yet. Make one: hdcs domain create NAME')),
                card('Storage and console ports', rows(
                    [['Domain node'], ['Storage used'], ['Promised to disks', 'hdcs-number'], ['Ports in use'],
                        ['Cooling', 'hdcs-number']], storage(seen), 'There is no domain node yet.')),
                card('What happened', rows([['When'], ['What'], ['To'], ['Message']], events(seen), 'Nothing yet.'))
            ];
        });
    }

    ({desktops: desktops, operations: operations, operation: operation, 'data-center': dataCenter})[
        page.getAttribute('data-hdcs')]();
}());
