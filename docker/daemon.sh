#!/usr/bin/env bash
# Start one daemon of compose.yaml in the foreground, from pyspark's jars.
# usage: daemon namenode | datanode | spark-master | spark-worker
set -euo pipefail
export SPARK_HOME=${SPARK_HOME:-$(python3 -c 'import os, pyspark; print(os.path.dirname(pyspark.__file__))')}
hdfs() {
  exec java -Xmx512m -cp "$HADOOP_CONF_DIR:/opt/hadoop/*:$SPARK_HOME/jars/*" "org.apache.hadoop.hdfs.server.$1" "${@:2}"
}
case ${1:-} in
  namenode)
    [[ -d /data/name/current ]] || (hdfs namenode.NameNode -format -nonInteractive)
    hdfs namenode.NameNode
    ;;
  datanode) hdfs datanode.DataNode ;;
  spark-master) exec "$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.master.Master --host spark-master --port 7077 ;;
  spark-worker) exec "$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.worker.Worker --work-dir /tmp/spark spark://spark-master:7077 ;;
  *)
    grep -m1 '^# usage: ' "$0" | cut -c3- >&2
    exit 2
    ;;
esac
